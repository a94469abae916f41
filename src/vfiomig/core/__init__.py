"""What the kernel's VFIO core and the common part of every driver do, for a ``Device``.

Bytes and a caller's memory come in; bytes, an errno and descriptors go out. Every front door
and the in-process client use this one implementation.

``migration`` takes arcs, ``transfer``, ``saving`` and ``resuming`` are the sessions, ``feature``
and its tables answer VFIO_DEVICE_FEATURE, ``v6`` the seed's request, ``vfio_device`` is the
device as programs open it, ``iommufd`` the other descriptor that they open.
"""
