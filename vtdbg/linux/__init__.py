"""What is known of Linux: its types out of BTF, its symbols, and KVM's objects read through them."""
