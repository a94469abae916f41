"""What the kernel headers say: request numbers, struct layouts and constants, nothing decided.

One module per header or per side of it. Constants carry the kernel's names, so that a search in
the kernel finds them; structs carry a CamelCase twin of the C name, which is their docstring.

=============  ===================================================================
`uapi`         how a C struct is written as an annotated class, and ``_IO``
`vfio`         ``linux/vfio.h``, the device: regions, interrupts, features, migration
`vfio_iommu`   ``linux/vfio.h``, the rest: group, container, type1
`iommufd`      ``linux/iommufd.h``
`seccomp`      ``linux/seccomp.h`` and what a filter is made of
`pci`          ``linux/pci_regs.h``: configuration space and capabilities
`kvm`          the one request of ``linux/kvm.h`` that names VFIO descriptors
`vfio_user`    what the vfio-user protocol sends over a socket instead
`syscalls`     system call numbers that a VFIO front door names
`ioctls`       the table of all requests, and the table of device features
=============  ===================================================================

Layouts and numbers are those of 64-bit little-endian Linux, in both dialects of the migration
protocol: the landed one, and the one of the patch "vfio: Define device migration protocol v2".
"""
