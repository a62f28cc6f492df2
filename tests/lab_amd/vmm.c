/* Lab VMM: one VM, four memslots, one long-mode vcpu with its own page tables,
 * a loop of many kinds of exit.  Prints "TRUTH key=value" lines on stdout. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <linux/kvm.h>
typedef uint64_t u64;
typedef uint32_t u32;
typedef uint8_t u8;
#define PG 4096UL
#define DIE(x)                                                                                                                             \
  do {                                                                                                                                     \
    printf("FAIL %s: %s\n", x, strerror(errno));                                                                                           \
    fflush(stdout);                                                                                                                        \
    exit(1);                                                                                                                               \
  } while (0)
static int vmfd, vcpufd, kvmfd;
static struct kvm_run *run;
struct slot {
  u64 gpa, size;
  int flags;
  u8 *p;
  const char *name;
};
static struct slot slots[] = {
    {0x000000000ULL, 0x200000, 0, 0, "low4k"},  /* 4 KiB pages            */
    {0x000400000ULL, 0x200000, 0, 0, "huge2m"}, /* 2 MiB THP -> NPT PDE   */
    {0x000800000ULL, 0x010000, KVM_MEM_READONLY, 0, "ro"},
    {0x100000000ULL, 0x010000, 0, 0, "high4g"}, /* above 4 GiB            */
}; /* hole: 0x200000..0x3fffff, 0x600000..0x7fffff, ... */
#define NS (int)(sizeof slots / sizeof *slots)
static u8 *g(u64 gpa) {
  for (int i = 0; i < NS; i++)
    if (gpa >= slots[i].gpa && gpa < slots[i].gpa + slots[i].size)
      return slots[i].p + (gpa - slots[i].gpa);
  return 0;
}
static u64 hpa(void *va) {
  int f = open("/proc/self/pagemap", O_RDONLY);
  u64 e = 0;
  if (f < 0 || pread(f, &e, 8, ((u64)va / PG) * 8) != 8)
    return ~0ULL;
  close(f);
  if (!(e >> 63))
    return ~0ULL;
  return (e & ((1ULL << 55) - 1)) * PG + ((u64)va & (PG - 1));
}
static u64 msr(u32 n) {
  int f = open("/dev/cpu/0/msr", O_RDONLY);
  u64 v = ~0ULL;
  if (f >= 0) {
    if (pread(f, &v, 8, n) != 8)
      v = ~0ULL;
    close(f);
  }
  return v;
}
extern char gcode[], gcode_end[], g_ud[], g_loop[];
/* guest code runs at GVA 0xffff800000000000 + 0x0 == GPA 0x10000 */
#define GCODE_GPA 0x10000ULL
#define GCODE_GVA 0xffff800000000000ULL
asm(".pushsection .rodata\n.balign 16\n"
    "gcode: .globl gcode\n"
    "  mov $0xffff800000003ff0,%rax; mov %rax,%rsp\n"
    "  xor %r15,%r15\n"
    "g_loop: .globl g_loop\n"
    "  inc %r15\n"
    "  mov %r15,0x20000\n"                             /* plain store, page 0x20 */
    "  mov $0x40000000,%eax; xor %ecx,%ecx; cpuid\n"   /* 0x72 CPUID */
    "  mov $0x3f8,%dx; mov $0x41,%al; out %al,%dx\n"   /* 0x7b IOIO out8 0x3f8 */
    "  mov $0x510,%dx; mov $0x1234,%ax; out %ax,%dx\n" /* IOIO out16 */
    "  mov $0xcf8,%dx; in %dx,%eax\n"                  /* IOIO in32 */
    "  in $0x71,%al\n"                                 /* IOIO imm in8 */
    "  mov $0x10,%ecx; rdmsr\n"                        /* TSC: 0x7c */
    "  mov $0x1b,%ecx; rdmsr\n"                        /* APIC_BASE */
    "  mov $0xc0000080,%ecx; rdmsr; wrmsr\n"           /* EFER r+w */
    "  mov $0xc0000082,%ecx; rdmsr\n"                  /* LSTAR: passthrough */
    "  mov $0x277,%ecx; rdmsr; wrmsr\n"                /* PAT r+w */
    "  mov %cr4,%rax; mov %rax,%cr4\n"                 /* 0x14 CR4 write */
    "  mov %cr0,%rax; mov %rax,%cr0\n"                 /* 0x10/0x65 */
    "  mov $5,%eax; mov %rax,%cr8\n"                   /* 0x18 CR8 write */
    "  mov $0x400,%eax; mov %rax,%dr7\n"               /* 0x37 DR7 write */
    "  wbinvd\n"                                       /* 0x89 */
    "  mov $0x77,%eax; vmmcall\n"                      /* 0x81 */
    "  ud2\n"                                          /* 0x46 then EVENTINJ #UD */
    "  mov $0xdeadbeef,%eax; mov %eax,0x200000\n"      /* NPF write in hole */
    "  mov 0x300008,%rax\n"                            /* NPF read in hole */
    "  movb $0x5a,0x800123\n"                          /* NPF write on RO slot */
    "  mov 0x800200,%rax\n"                            /* plain read of RO slot */
    "  mov $0xffff900000000000,%rbx\n"
    "  mov %r15,0x1008(%rbx)\n" /* GPA 0x100001008 (1 GiB guest page) */
    "  mov %r15,0x400018\n"     /* huge slot */
    "  mov %r15,0x5ff018\n"
    "  .globl g_hlt\n"
    "g_hlt: hlt\n" /* 0x78 */
    "  jmp g_loop\n"
    "g_ud: .globl g_ud\n"
    "  addq $2,(%rsp)\n"
    "  iretq\n"
    "gcode_end: .globl gcode_end\n"
    ".popsection\n");
extern char g_hlt[];
static void wq(u64 gpa, u64 v) { *(u64 *)g(gpa) = v; }
static void build(void) {
  u64 F = 7;                      /* P RW US */
  wq(0x1000 + 0 * 8, 0x2000 | F); /* PML4[0]   -> PDPT 0x2000 */
  wq(0x2000 + 0 * 8, 0x3000 | F); /* PDPT[0]   -> PD   0x3000 */
  wq(0x3000 + 0 * 8, 0x4000 | F); /* PD[0]     -> PT   0x4000 (4K) */
  for (int i = 0; i < 512; i++)
    wq(0x4000 + i * 8, (u64)i * PG | F);
  for (int i = 1; i < 512; i++)
    wq(0x3000 + i * 8, ((u64)i << 21) | 0x80 | F); /* 2 MiB pages */
  wq(0x1000 + 256 * 8, 0x8000 | F);                /* PML4[256] GVA ffff8000_00000000 */
  wq(0x8000 + 0 * 8, 0x9000 | F);
  wq(0x9000 + 0 * 8, 0xa000 | F);
  for (int i = 0; i < 4; i++)
    wq(0xa000 + i * 8, (GCODE_GPA + i * PG) | 3);
  wq(0xa000 + 5 * 8, 0x21000 | (1ULL << 63) | 1); /* GVA ..5000 -> 0x21000, NX, RO, supervisor */
  wq(0xa000 + 6 * 8, 0x22000 | 2);                /* not present */
  wq(0x1000 + 288 * 8, 0xb000 | F);               /* PML4[288] GVA ffff9000_00000000 */
  wq(0xb000 + 0 * 8, 0x100000000ULL | 0x80 | 3);  /* 1 GiB page -> GPA 4 GiB */
  /* GDT at 0x5000 */
  wq(0x5000, 0);
  wq(0x5008, 0x00af9b000000ffffULL);
  wq(0x5010, 0x00cf93000000ffffULL);
  wq(0x5018, 0x00cffb000000ffffULL);
  wq(0x5020, 0x00cff3000000ffffULL);
  wq(0x5028, 0x00affb000000ffffULL);
  u64 tb = 0xffff800000002000ULL, tl = 0x67; /* TSS base is at GVA ..2000 = GPA 0x12000 */
  wq(0x5030, (tl & 0xffff) | ((tb & 0xffffff) << 16) | (0x8bULL << 40) | (((tl >> 16) & 0xf) << 48) | (((tb >> 24) & 0xff) << 56));
  wq(0x5038, tb >> 32);
  *(u64 *)(g(0x12000) + 4) = 0xffff800000003ff0ULL;    /* RSP0 */
  *(u64 *)(g(0x12000) + 0x24) = 0xffff800000003e00ULL; /* IST1 */
  *(uint16_t *)(g(0x12000) + 0x66) = 0x68;
  /* IDT at 0x6000: vector 6 */
  u64 h = GCODE_GVA + (g_ud - gcode);
  wq(0x6000 + 6 * 16, (h & 0xffff) | (8ULL << 16) | (0x8eULL << 40) | (((h >> 16) & 0xffff) << 48));
  wq(0x6000 + 6 * 16 + 8, h >> 32);
  memcpy(g(GCODE_GPA), gcode, gcode_end - gcode);
}
static struct kvm_segment seg(u64 base, u32 lim, int sel, int type, int s, int l, int db, int gr, int dpl) {
  struct kvm_segment x;
  memset(&x, 0, sizeof x);
  x.base = base;
  x.limit = lim;
  x.selector = sel;
  x.type = type;
  x.s = s;
  x.l = l;
  x.db = db;
  x.g = gr;
  x.present = 1;
  x.dpl = dpl;
  return x;
}
__attribute__((noinline)) void truth_ready(void) { asm volatile("nop; nop; nop" ::: "memory"); }
int main(int ac, char **av) {
  int iters = ac > 1 ? atoi(av[1]) : 3;
  setvbuf(stdout, 0, _IOLBF, 0);
  kvmfd = open("/dev/kvm", O_RDWR);
  if (kvmfd < 0)
    DIE("/dev/kvm");
  vmfd = ioctl(kvmfd, KVM_CREATE_VM, 0);
  if (vmfd < 0)
    DIE("create_vm");
  for (int i = 0; i < NS; i++) {
    struct slot *s = &slots[i];
    u64 al = i == 1 ? 0x200000 : PG;
    u8 *r = MAP_FAILED;
    if (i == 1) {
      r = mmap(0, s->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
      printf("LAB hugetlb %s\n", r == MAP_FAILED ? "no" : "yes");
    }
    if (r == MAP_FAILED)
      r = mmap(0, s->size + al, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (r == MAP_FAILED)
      DIE("mmap");
    s->p = (u8 *)(((u64)r + al - 1) & ~(al - 1));
    madvise(s->p, s->size, i == 1 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    struct kvm_userspace_memory_region m = {
        .slot = i, .flags = s->flags, .guest_phys_addr = s->gpa, .memory_size = s->size, .userspace_addr = (u64)s->p};
    if (ioctl(vmfd, KVM_SET_USER_MEMORY_REGION, &m))
      DIE("memslot");
    printf("TRUTH slot%d name=%s gpa=0x%llx size=0x%llx flags=%d hva=0x%llx\n", i, s->name, (unsigned long long)s->gpa,
           (unsigned long long)s->size, s->flags, (unsigned long long)(u64)s->p);
  }
  if (mlockall(MCL_CURRENT | MCL_FUTURE))
    DIE("mlockall");
  build();
  /* recognisable content: "vtdbgGPA" + gpa at offset 0 of chosen pages */
  u64 mark[] = {0x20000,  0x21000,  0x1ff000,       0x400000,       0x500000,      0x5ff000,
                0x800000, 0x80f000, 0x100000000ULL, 0x100001000ULL, 0x10000f000ULL};
  for (unsigned i = 0; i < sizeof mark / 8; i++) {
    if (mark[i] != 0x20000)
      memcpy(g(mark[i]) + (mark[i] == 0x400000 || mark[i] == 0x5ff000 || mark[i] == 0x100001000ULL ? 0x100 : 0), "vtdbgGPA", 8);
    *(u64 *)(g(mark[i]) + 0x108) = mark[i];
  }
  vcpufd = ioctl(vmfd, KVM_CREATE_VCPU, 0);
  if (vcpufd < 0)
    DIE("create_vcpu");
  int rs = ioctl(kvmfd, KVM_GET_VCPU_MMAP_SIZE, 0);
  run = mmap(0, rs, PROT_READ | PROT_WRITE, MAP_SHARED, vcpufd, 0);
  struct {
    struct kvm_cpuid2 h;
    struct kvm_cpuid_entry2 e[100];
  } c;
  memset(&c, 0, sizeof c);
  c.h.nent = 100;
  if (ioctl(kvmfd, KVM_GET_SUPPORTED_CPUID, &c))
    DIE("get_cpuid");
  if (ioctl(vcpufd, KVM_SET_CPUID2, &c))
    DIE("set_cpuid");
  struct kvm_sregs s;
  ioctl(vcpufd, KVM_GET_SREGS, &s);
  s.cs = seg(0, ~0u, 8, 11, 1, 1, 0, 1, 0);
  s.ds = s.es = s.ss = seg(0, ~0u, 16, 3, 1, 0, 1, 1, 0);
  s.fs = s.ds;
  s.gs = s.ds;
  s.fs.base = 0x1111000;
  s.gs.base = 0xffff800000001000ULL;
  s.tr = seg(0xffff800000002000ULL, 0x67, 0x30, 11, 0, 0, 0, 0, 0);
  memset(&s.ldt, 0, sizeof s.ldt);
  s.ldt.unusable = 1;
  s.ldt.type = 2;
  s.gdt.base = 0x5000;
  s.gdt.limit = 0x3f;
  s.idt.base = 0x6000;
  s.idt.limit = 0xfff;
  s.cr0 = 0x80050033;
  s.cr3 = 0x1000;
  s.cr4 = 0x6a0 & ~0x80;
  s.efer = 0xd00;
  if (ioctl(vcpufd, KVM_SET_SREGS, &s))
    DIE("set_sregs");
  struct kvm_regs r;
  memset(&r, 0, sizeof r);
  r.rip = GCODE_GVA;
  r.rsp = 0;
  r.rflags = 2;
  r.rbx = 0xb0b0b0b0;
  r.r14 = 0x1414141414141414ULL;
  if (ioctl(vcpufd, KVM_SET_REGS, &r))
    DIE("set_regs");
  int hl = 0;
  long n = 0;
  int told = 0;
  for (;;) {
    if (ioctl(vcpufd, KVM_RUN, 0) < 0) {
      if (errno == EINTR)
        continue;
      DIE("KVM_RUN");
    }
    n++;
    if (!told) {
      ioctl(vcpufd, KVM_GET_REGS, &r);
      printf("UEXIT %ld reason=%d rip=0x%llx", n, run->exit_reason, (unsigned long long)r.rip);
      if (run->exit_reason == KVM_EXIT_IO)
        printf(" io %s port=0x%x size=%d", run->io.direction ? "out" : "in", run->io.port, run->io.size);
      if (run->exit_reason == KVM_EXIT_MMIO)
        printf(" mmio %s gpa=0x%llx len=%d", run->mmio.is_write ? "w" : "r", (unsigned long long)run->mmio.phys_addr, run->mmio.len);
      printf("\n");
    }
    if (run->exit_reason == KVM_EXIT_IO && !run->io.direction)
      memset((u8 *)run + run->io.data_offset, 0x11, run->io.size);
    if (run->exit_reason == KVM_EXIT_MMIO && !run->mmio.is_write)
      memset(run->mmio.data, 0x22, 8);
    if (run->exit_reason == KVM_EXIT_FAIL_ENTRY || run->exit_reason == KVM_EXIT_INTERNAL_ERROR || run->exit_reason == KVM_EXIT_SHUTDOWN) {
      printf("FAIL exit %d sub=%u hw=0x%llx\n", run->exit_reason, run->internal.suberror,
             (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
      break;
    }
    if (run->exit_reason == KVM_EXIT_HLT && ++hl == iters && !told) {
      told = 1;
      struct kvm_sregs q;
      ioctl(vcpufd, KVM_GET_SREGS, &q);
      ioctl(vcpufd, KVM_GET_REGS, &r);
      printf("TRUTH guest rip=0x%llx rsp=0x%llx rflags=0x%llx rax=0x%llx rbx=0x%llx rcx=0x%llx rdx=0x%llx r14=0x%llx r15=0x%llx cr0=0x%llx "
             "cr2=0x%llx cr3=0x%llx cr4=0x%llx cr8=0x%llx efer=0x%llx gdt=0x%llx/0x%x idt=0x%llx/0x%x tr=0x%x,0x%llx fsbase=0x%llx "
             "gsbase=0x%llx\n",
             (unsigned long long)r.rip, (unsigned long long)r.rsp, (unsigned long long)r.rflags, (unsigned long long)r.rax,
             (unsigned long long)r.rbx, (unsigned long long)r.rcx, (unsigned long long)r.rdx, (unsigned long long)r.r14,
             (unsigned long long)r.r15, (unsigned long long)q.cr0, (unsigned long long)q.cr2, (unsigned long long)q.cr3,
             (unsigned long long)q.cr4, (unsigned long long)q.cr8, (unsigned long long)q.efer, (unsigned long long)q.gdt.base, q.gdt.limit,
             (unsigned long long)q.idt.base, q.idt.limit, q.tr.selector, (unsigned long long)q.tr.base, (unsigned long long)q.fs.base,
             (unsigned long long)q.gs.base);
      printf("TRUTH code gva=0x%llx gpa=0x%llx len=0x%lx loop=0x%llx hlt=0x%llx ud=0x%llx\n", (unsigned long long)GCODE_GVA,
             (unsigned long long)GCODE_GPA, (long)(gcode_end - gcode), (unsigned long long)(GCODE_GVA + (g_loop - gcode)),
             (unsigned long long)(GCODE_GVA + (g_hlt - gcode)), (unsigned long long)(GCODE_GVA + (g_ud - gcode)));
      u64 gp[] = {0x1000,   0x2000,   0x3000,   0x4000,   0x5000,         0x6000,         0x8000,         0x9000,   0xa000,
                  0xb000,   0x10000,  0x12000,  0x13000,  0x20000,        0x21000,        0x1ff000,       0x400000, 0x401000,
                  0x500000, 0x5ff000, 0x800000, 0x80f000, 0x100000000ULL, 0x100001000ULL, 0x10000f000ULL, 0x30000};
      for (unsigned i = 0; i < sizeof gp / 8; i++)
        printf("TRUTH gpa=0x%llx hpa=0x%llx hva=0x%llx\n", (unsigned long long)gp[i], (unsigned long long)hpa(g(gp[i])),
               (unsigned long long)(u64)g(gp[i]));
      printf("TRUTH kvm_run hpa=0x%llx size=0x%x\n", (unsigned long long)hpa(run), rs);
      printf("TRUTH msr hsave=0x%llx efer=0x%llx vm_cr=0x%llx pat=0x%llx lstar=0x%llx\n", (unsigned long long)msr(0xc0010117),
             (unsigned long long)msr(0xc0000080), (unsigned long long)msr(0xc0010114), (unsigned long long)msr(0x277),
             (unsigned long long)msr(0xc0000082));
      fflush(stdout);
      int t = open("/sys/kernel/tracing/tracing_on", O_WRONLY);
      if (t >= 0) {
        if (write(t, "0", 1) != 1)
          printf("?\n");
        close(t);
      }
      {
        FILE *f = fopen("/sys/kernel/tracing/trace", "r");
        char l[512];
        while (f && fgets(l, sizeof l, f))
          if (l[0] != '#')
            printf("TRACE %s", l);
        if (f)
          fclose(f);
        else
          printf("no trace: %s\n", strerror(errno));
      }
      printf("TRUTH truth_ready=%p pid=%d\n", (void *)truth_ready, getpid());
      printf("LAB READY\n");
      fflush(stdout);
      truth_ready();
    }
  }
  return 1;
}
