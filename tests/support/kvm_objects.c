/* KVM's objects as a kernel would have them, linked at 0x80a00000: types and values for tests of how they are found.
 * OLD: an array of vCPUs and no kvm_running_vcpu.  SVM: kvm-amd before vmcb01 and with a pointer in svm_data, else kvm-intel. */
#define PAGE(physical) ((void *)(0x80000000UL + (physical)))
#define PERCPU 0x40000UL
typedef unsigned long u64;
struct list_head {
  struct list_head *next, *prev;
};
struct kvm;
struct kvm_vcpu {
  struct kvm *kvm;
  int cpu, vcpu_id, vcpu_idx, mode;
};
struct vmcs {
  unsigned revision_id, abort;
};
struct vmcs12 {
  unsigned revision_id;
};
struct loaded_vmcs {
  struct vmcs *vmcs, *shadow_vmcs;
  int cpu;
};
struct vcpu_vmx {
  char before[40]; /* the kernel has it at 0; nothing may count on that */
  struct kvm_vcpu vcpu;
  struct loaded_vmcs vmcs01;
  struct loaded_vmcs *loaded_vmcs;
  struct {
    struct loaded_vmcs vmcs02;
    struct vmcs12 *cached_vmcs12;
  } nested;
};
struct vmcb {
  char bytes[4096];
};
struct svm_cpu_data {
  int cpu;
  void *save_area;
  struct vmcb *current_vmcb;
};
struct vcpu_svm {
  struct kvm_vcpu vcpu;
  struct vmcb *vmcb;
  u64 vmcb_pa;
};
struct xarray {
  unsigned lock;
  void *xa_head;
};
struct xa_node {
  unsigned char shift, offset, count;
  void *parent;
  void *slots[64];
};
struct kvm {
#ifdef OLD
  struct kvm_vcpu *vcpus[288];
#else
  struct xarray vcpu_array;
#endif
  struct list_head vm_list;
  int userspace_pid;
};

extern struct list_head vm_list;
extern struct kvm first, second;
#define VMX(name, owner, id, on, page, ...)                                                                                                \
  struct vcpu_vmx name = {.vcpu = {.kvm = &owner, .cpu = on, .vcpu_id = id, .mode = 1}, .vmcs01 = {.vmcs = page}, __VA_ARGS__}
#ifdef SVM
struct vcpu_svm one = {.vcpu = {.kvm = &first, .cpu = 1, .vcpu_id = 0, .mode = 0}, .vmcb = PAGE(0x30000), .vmcb_pa = 0x30000};
struct svm_cpu_data data1 = {.cpu = 1, .current_vmcb = PAGE(0x30000)};
void *area0[8] = {0}, *area1[8] = {&data1};
struct svm_cpu_data *svm_data __attribute__((section(".percpu")));
struct kvm first = {.vcpus = {&one.vcpu}, .vm_list = {&vm_list, &vm_list}, .userspace_pid = 4711}, second;
struct list_head vm_list = {&first.vm_list, &first.vm_list};
#else
extern struct vcpu_vmx two;
VMX(one, first, 0, 0, PAGE(0x6000), .loaded_vmcs = &one.vmcs01);
VMX(two, second, 70, 1, PAGE(0x31000), .loaded_vmcs = &two.nested.vmcs02,
    .nested = {.vmcs02 = {.vmcs = PAGE(0x32000)}, .cached_vmcs12 = PAGE(0x33000)});
struct vmcs *current_vmcs __attribute__((section(".percpu")));
#ifdef OLD
void *area0[8] = {PAGE(0x6000)}, *area1[8] = {PAGE(0x32000)};
struct kvm first = {.vcpus = {&one.vcpu}, .vm_list = {&second.vm_list, &vm_list}, .userspace_pid = 4711};
struct kvm second = {.vcpus = {0, &two.vcpu}, .vm_list = {&vm_list, &first.vm_list}, .userspace_pid = 4712};
#else
struct kvm_vcpu *kvm_running_vcpu __attribute__((section(".percpu")));
void *area0[8] = {PAGE(0x6000), &one.vcpu}, *area1[8] = {PAGE(0x32000), 0};
#define NODE(node) ((void *)((char *)&node + 2)) /* an internal entry ends in 10b */
struct xa_node leaf = {.shift = 0, .count = 1, .slots = {[6] = &two.vcpu}};
struct xa_node top = {.shift = 6, .count = 1, .slots = {[1] = NODE(leaf)}};
struct kvm first = {.vcpu_array = {.xa_head = &one.vcpu}, .vm_list = {&second.vm_list, &vm_list}, .userspace_pid = 4711};
struct kvm second = {.vcpu_array = {.xa_head = NODE(top)}, .vm_list = {&vm_list, &first.vm_list}, .userspace_pid = 4712};
#endif
struct list_head vm_list = {&first.vm_list, &second.vm_list};
#endif
u64 __per_cpu_offset[2] = {(u64)area0 - PERCPU, (u64)area1 - PERCPU};
unsigned nr_cpu_ids = 2;
