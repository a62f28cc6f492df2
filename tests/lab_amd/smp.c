/* Two VMs for a machine of two processors.  Prints "TRUTH key=value" lines on stdout.
 *
 * VM A: vCPU 0 on processor 0, vCPU 1 on processor 1; both share page tables, GDT and IDT and differ in TR only.
 * VM B (a process of its own): vCPU 0 on processor 1, a hypervisor that runs a guest of its own by VMRUN.
 * Every guest ends in a loop at an address of its own: A0_LOOP, A1_LOOP, L2_LOOP. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
typedef uint64_t u64;
typedef uint32_t u32;
typedef uint8_t u8;
typedef uint16_t u16;
#define SIZE 0x200000UL
#define GDT 0x5000
#define IDT 0x6000
#define TSS 0x7000
#define VMCB12 0x20000
#define HSAVE 0x21000
#define CODE 0x10000
#define DIE(x)                                                                                                                             \
  do {                                                                                                                                     \
    printf("FAIL %s: %s\n", x, strerror(errno));                                                                                           \
    exit(1);                                                                                                                               \
  } while (0)

extern char code[], code_end[], a0[], a1[], b0[], a0_loop[], a1_loop[], l2_loop[], l2[];
asm(".pushsection .rodata\n.balign 16\n"
    "code: .globl code\n"
    "a0: .globl a0\n"
    "  xor %r15,%r15; out %al,$0x10\n"
    "a0_loop: .globl a0_loop\n"
    "  inc %r15; jmp a0_loop\n"
    ".balign 256\n"
    "a1: .globl a1\n"
    "  xor %r15,%r15; out %al,$0x10\n"
    "a1_loop: .globl a1_loop\n"
    "  inc %r15; jmp a1_loop\n"
    ".balign 256\n"
    "b0: .globl b0\n"
    "  mov $0xc0000080,%ecx; rdmsr; or $0x1000,%eax; wrmsr\n" /* EFER.SVME */
    "  mov $0xc0010117,%ecx; mov $0x21000,%eax; xor %edx,%edx; wrmsr\n" /* VM_HSAVE_PA */
    "  out %al,$0x10\n"
    "1: mov 0x20000,%rax; mov $0x20000,%eax; vmrun; jmp 1b\n" /* read, so that it is in the nested tables */
    ".balign 256\n"
    "l2: .globl l2\n"
    "  xor %r15,%r15\n"
    "l2_loop: .globl l2_loop\n"
    "  inc %r15; jmp l2_loop\n"
    "code_end: .globl code_end\n"
    ".popsection\n");
#define AT(label) (CODE + (u64)((label) - code))

static u8 *memory;
static int kvm, vm;
static void q(u64 at, u64 value) { memcpy(memory + at, &value, 8); }
static void segment12(u64 at, u16 selector, u16 attributes, u32 limit, u64 base) {
  memcpy(memory + at, &selector, 2);
  memcpy(memory + at + 2, &attributes, 2);
  memcpy(memory + at + 4, &limit, 4);
  q(at + 8, base);
}
static void tables(void) {
  q(0x1000, 0x2003);
  q(0x2000, 0x3003);
  q(0x3000, 0x83);
  q(GDT + 8, 0x00af9b000000ffffULL);
  q(GDT + 16, 0x00cf93000000ffffULL);
  memcpy(memory + CODE, code, code_end - code);
}
/* A VMCB for the guest's own guest (APM vol. 2, appendix VMCB Layout): the same tables, RIP at l2. */
static void vmcb12(void) {
  u64 v = VMCB12, s = v + 0x400;
  q(v + 0x10, 1);          /* intercept VMRUN */
  q(v + 0x58, 1);          /* ASID */
  segment12(s + 0x00, 16, 0xc93, ~0u, 0);
  segment12(s + 0x10, 8, 0xa9b, ~0u, 0);
  segment12(s + 0x20, 16, 0xc93, ~0u, 0);
  segment12(s + 0x30, 16, 0xc93, ~0u, 0);
  segment12(s + 0x60, 0, 0, 0x3f, GDT);
  segment12(s + 0x80, 0, 0, 0xfff, IDT);
  segment12(s + 0x90, 0x30, 0x8b, 0x67, TSS + 0x800);
  q(s + 0xd0, 0x1500);
  q(s + 0x148, 0x20);
  q(s + 0x150, 0x1000);
  q(s + 0x158, 0x80050033);
  q(s + 0x160, 0x400);
  q(s + 0x168, 0xffff0ff0);
  q(s + 0x170, 2);
  q(s + 0x178, AT(l2));
  q(s + 0x1d8, 0x80000);
  q(s + 0x268, 0x0007040600070406ULL);
}
static struct kvm_segment segment(u64 base, u32 limit, int selector, int type, int s, int l, int db, int g) {
  struct kvm_segment x = {.base = base, .limit = limit, .selector = selector, .type = type, .s = s, .l = l, .db = db, .g = g, .present = 1};
  return x;
}
static void machine(void) {
  kvm = open("/dev/kvm", O_RDWR);
  vm = ioctl(kvm, KVM_CREATE_VM, 0);
  memory = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  struct kvm_userspace_memory_region m = {.memory_size = SIZE, .userspace_addr = (u64)memory};
  if (vm < 0 || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &m))
    DIE("VM");
  tables();
}
static void pin(int processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processor, &set);
  if (sched_setaffinity(0, sizeof set, &set))
    DIE("affinity");
}
static int create(int number) {
  static struct {
    struct kvm_cpuid2 h;
    struct kvm_cpuid_entry2 e[100];
  } c;
  int vcpu = ioctl(vm, KVM_CREATE_VCPU, number);
  c.h.nent = 100;
  if (vcpu < 0 || ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &c) || ioctl(vcpu, KVM_SET_CPUID2, &c))
    DIE("vCPU");
  return vcpu;
}
static void load(int vcpu, u64 rip, u64 tss) {
  struct kvm_sregs s;
  struct kvm_regs r = {.rip = rip, .rsp = 0x80000, .rflags = 2};
  ioctl(vcpu, KVM_GET_SREGS, &s);
  s.cs = segment(0, ~0u, 8, 11, 1, 1, 0, 1);
  s.ds = s.es = s.ss = s.fs = s.gs = segment(0, ~0u, 16, 3, 1, 0, 1, 1);
  s.tr = segment(tss, 0x67, 0x30, 11, 0, 0, 0, 0);
  s.gdt.base = GDT;
  s.gdt.limit = 0x3f;
  s.idt.base = IDT;
  s.idt.limit = 0xfff;
  s.cr0 = 0x80050033;
  s.cr3 = 0x1000;
  s.cr4 = 0x20;
  s.efer = 0x500;
  if (ioctl(vcpu, KVM_SET_SREGS, &s) || ioctl(vcpu, KVM_SET_REGS, &r))
    DIE("registers");
}
static u64 msr(int processor, u32 number) {
  char name[32];
  u64 value = 0;
  snprintf(name, sizeof name, "/dev/cpu/%d/msr", processor);
  int file = open(name, O_RDONLY);
  if (file < 0 || pread(file, &value, 8, number) != 8)
    DIE("MSR");
  return value;
}
/* Runs to the guest's first OUT, waits, and runs on for ever. */
static void run(int vcpu, int processor, u64 rip, u64 tss, int wait) {
  pin(processor);
  load(vcpu, rip, tss);
  int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
  struct kvm_run *area = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  for (int told = 0;;) {
    if (ioctl(vcpu, KVM_RUN, 0) && errno != EINTR)
      DIE("KVM_RUN");
    if (area->exit_reason == KVM_EXIT_IO && !told++) {
      printf("TRUTH hsave%d=%#llx\n", processor, (unsigned long long)msr(processor, 0xc0010117));
      struct timespec pause = {wait / 1000, wait % 1000 * 1000000};
      nanosleep(&pause, 0);
    } else if (area->exit_reason != KVM_EXIT_INTR && area->exit_reason != KVM_EXIT_IO) {
      printf("FAIL exit %u of the guest at %#llx\n", area->exit_reason, (unsigned long long)rip);
      exit(1);
    }
  }
}
static void *first(void *vcpu) {
  run((int)(long)vcpu, 0, AT(a0), TSS, 1500);
  return 0;
}
__attribute__((noinline)) void smp_ready(void) { asm volatile("nop; nop; nop" ::: "memory"); }
int main(void) {
  setvbuf(stdout, 0, _IOLBF, 0);
  printf("TRUTH a0_loop=%#llx a1_loop=%#llx l2_loop=%#llx\n", (unsigned long long)AT(a0_loop), (unsigned long long)AT(a1_loop),
         (unsigned long long)AT(l2_loop));
  smp_ready();
  /* KVM lists its VMs in the order in which they were made: B after A. */
  int made[2];
  char byte = 0;
  if (pipe(made))
    DIE("pipe");
  int other = fork();
  if (!other) {
    if (read(made[0], &byte, 1) != 1)
      DIE("read");
    machine();
    vmcb12();
    printf("TRUTH pid_b=%d\n", getpid());
    run(create(0), 1, AT(b0), TSS, 3000);
  }
  machine();
  if (write(made[1], &byte, 1) != 1)
    DIE("write");
  printf("TRUTH pid_a=%d\n", getpid());
  int zero = create(0), one = create(1);
  pthread_t thread;
  pthread_create(&thread, 0, first, (void *)(long)zero);
  printf("LAB READY\n");
  run(one, 1, AT(a1), TSS + 0x400, 500);
}
