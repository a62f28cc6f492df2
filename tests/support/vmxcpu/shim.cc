// Preloaded beside the bochscpu wheel.  It supplies what the wheel wants from a newer C library, an A20 line that is on (VMXON
// asserts it otherwise), the choice of the processor model, an end for guests that wait for ever, and Bochs' own messages.
//
// Every definition here stands before the wheel's own in the dynamic linker's search order; the wheel calls them through its PLT.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

struct BX_CPU_C {
  bool handleWaitForEvent();
};

namespace {

struct Log {
  int length;
  char text[1 << 16];
};

// Shared, so that the parent of a process that hangs can still read it.
Log *const log_page = static_cast<Log *>(mmap(nullptr, sizeof(Log), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));

void put(const char *format, va_list arguments) {
  int room = static_cast<int>(sizeof(log_page->text)) - log_page->length - 2;
  if (room <= 0) return;
  int written = vsnprintf(log_page->text + log_page->length, room, format, arguments);
  log_page->length += written < room ? written : room - 1;
  log_page->text[log_page->length++] = '\n';
  log_page->text[log_page->length] = 0;
}

void (*on_wait)() = nullptr;

int find_wheel(dl_phdr_info *info, size_t, void *found) {
  if (!strstr(info->dlpi_name, "_bochscpu.")) return 0;
  *static_cast<void **>(found) = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  return 1;
}

void *wheel_symbol(const char *name) {
  void *wheel = nullptr;
  dl_iterate_phdr(find_wheel, &wheel);
  void *symbol = wheel ? dlsym(wheel, name) : nullptr;
  if (!symbol) {
    fprintf(stderr, "vmxcpu: the wheel has no symbol %s\n", name);
    _Exit(3);
  }
  return symbol;
}

}  // namespace

extern "C" {
unsigned long long __isoc23_strtoull(const char *a, char **b, int c) { return strtoull(a, b, c); }
unsigned long __isoc23_strtoul(const char *a, char **b, int c) { return strtoul(a, b, c); }
long long __isoc23_strtoll(const char *a, char **b, int c) { return strtoll(a, b, c); }
long __isoc23_strtol(const char *a, char **b, int c) { return strtol(a, b, c); }
int __isoc23_sscanf(const char *s, const char *f, ...) { va_list a; va_start(a, f); int r = vsscanf(s, f, a); va_end(a); return r; }
int __isoc23_fscanf(FILE *s, const char *f, ...) { va_list a; va_start(a, f); int r = vfscanf(s, f, a); va_end(a); return r; }

void vmxcpu_log_clear() { log_page->length = 0; log_page->text[0] = 0; }
const char *vmxcpu_log_text() { return log_page->text; }
void vmxcpu_on_wait(void (*callback)()) { on_wait = callback; }
}

// A processor that is halted, shut down or waits for SIPI would spin here for ever: no device will wake it.
bool BX_CPU_C::handleWaitForEvent() {
  if (on_wait) on_wait();
  return true;
}

struct bx_pc_system_c { bool get_enable_a20(); };
bool bx_pc_system_c::get_enable_a20() { return true; }

struct logfunctions {
  void error(const char *f, ...);
  void info(const char *f, ...);
  void panic(const char *f, ...);
};
void logfunctions::error(const char *f, ...) { va_list a; va_start(a, f); put(f, a); va_end(a); }
void logfunctions::info(const char *f, ...) { va_list a; va_start(a, f); put(f, a); va_end(a); }
void logfunctions::panic(const char *f, ...) { va_list a; va_start(a, f); put(f, a); va_end(a); }

// The wheel asks for this model (Cannon Lake); VMXCPU_MODEL names another one of Bochs' ("sapphire_rapids", "core2_penryn_t9600", "ryzen").
void *create_corei3_cnl_cpuid(BX_CPU_C *cpu) {
  const char *model = getenv("VMXCPU_MODEL");
  char name[64], mangled[128];
  snprintf(name, sizeof name, "create_%s_cpuid", model && *model ? model : "corei3_cnl");
  snprintf(mangled, sizeof mangled, "_Z%zu%sP8BX_CPU_C", strlen(name), name);
  return reinterpret_cast<void *(*)(BX_CPU_C *)>(wheel_symbol(mangled))(cpu);
}
