"""``linux/kvm.h``, the one request in which a monitor shows KVM a VFIO descriptor."""

from __future__ import annotations

from vfiomig.abi.uapi import IOW, UapiStruct, u32, u64

KVM_DEV_VFIO_FILE = 1
KVM_DEV_VFIO_FILE_ADD = 1
KVM_DEV_VFIO_FILE_DEL = 2


class KvmDeviceAttr(UapiStruct):
    """struct kvm_device_attr, whose addr points to an s32 descriptor in the group FILE."""

    flags: u32
    group: u32
    attr: u64
    addr: u64


KVMIO = 0xAE
KVM_SET_DEVICE_ATTR = IOW(KVMIO, 0xE1, KvmDeviceAttr.SIZE)
