"""Groups, containers and the character device, opened and closed in any order, against a model.

The model is what docs and headers say: who is open, which group is in which container, which
container has its IOMMU. Every request's errno is computed from it before the request is made.
"""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from in_process import IOMMUFD, Caller, Scripted
from iommu_requests import words
from vfiomig.abi import vfio
from vfiomig.abi import vfio_iommu as abi
from vfiomig.core.container import Container
from vfiomig.core.group import Group
from vfiomig.core.vfio_compat import compat_ioas
from vfiomig.core.vfio_device import VfioDevice, VfioDeviceFile

if TYPE_CHECKING:
    from vfiomig.core.iommufd import Iommufd

GROUPS, CONTAINERS = 2, 2
#: The descriptors of the containers, of which the last is an iommufd.
NUMBERS = (*range(100, 100 + CONTAINERS), IOMMUFD)
COMPAT = CONTAINERS
groups, containers = st.integers(0, GROUPS - 1), st.integers(0, COMPAT)


class One:
    """A device with its group, and what the model knows of it."""

    def __init__(self, number: int) -> None:
        self.device = Scripted()
        self.served = VfioDevice(self.device, f"vfio{number}")
        self.group = Group(self.served, f"0000:{number + 1:02x}:00.0")
        self.is_open = False
        self.container: int | None = None
        #: Whether the devices that were given out belong to the iommufd.
        self.in_iommufd = False
        self.given: list[VfioDeviceFile] = []
        self.nodes: list[VfioDeviceFile] = []
        self.bound: VfioDeviceFile | None = None

    @property
    def is_held(self) -> bool:
        return self.is_open or bool(self.given)


class Lifecycle(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.caller = Caller()
        self.caller.containers = {number: Container() for number in NUMBERS[:COMPAT]}
        context = self.caller.iommufds[IOMMUFD]
        assert context is not None
        self.iommufd = context
        #: Whether a group was in the iommufd at any time.
        self.had_group = False
        self.ones = [One(number) for number in range(GROUPS)]
        #: Containers that have their IOMMU.
        self.ready: set[int] = set()

    def teardown(self) -> None:
        for one in self.ones:
            for file in (*one.given, *one.nodes):
                file.release()
            if one.is_open:
                one.group.leave()

    def members(self, container: int) -> list[One]:
        return [one for one in self.ones if one.container == container]

    def left(self, one: One) -> None:
        """The model's part of a close: the last holder takes the group out of its container."""
        one.in_iommufd = one.in_iommufd and bool(one.given)
        if not one.is_held:
            self.leave_container(one)

    def leave_container(self, one: One) -> None:
        container, one.container = one.container, None
        if container is not None and not self.members(container):
            self.ready.discard(container)

    def at(self, on: Group | Container | Iommufd | VfioDeviceFile, number: int, arg: int) -> int:
        """Make a request; a failure is a negative errno."""
        try:
            return on.ioctl(number, arg, self.caller)
        except OSError as failure:
            return -(failure.errno or 1)

    def request(self, on: Group | VfioDeviceFile, number: int, argument: bytes = b"\0") -> int:
        buffer = ctypes.create_string_buffer(argument, len(argument))
        return self.at(on, number, ctypes.addressof(buffer))

    # The group.

    @rule(n=groups)
    def open_group(self, n: int) -> None:
        one = self.ones[n]
        refused = one.is_held or one.bound is not None
        if refused:
            with pytest.raises(OSError) as caught:
                one.group.open()
            assert caught.value.errno == errno.EBUSY
        else:
            one.group.open()
            one.is_open = True

    @rule(n=groups)
    def close_group(self, n: int) -> None:
        one = self.ones[n]
        if one.is_open:
            one.group.leave()
            one.is_open = False
            self.left(one)

    @rule(n=groups, c=containers)
    def set_container(self, n: int, c: int) -> None:
        one = self.ones[n]
        if one.is_open:
            result = self.request(one.group, abi.VFIO_GROUP_SET_CONTAINER, words(NUMBERS[c]))
            busy = -errno.EBUSY if one.in_iommufd and c != COMPAT else 0
            assert result == (-errno.EINVAL if one.container is not None else busy)
            if not result:
                one.container = c
                self.had_group |= c == COMPAT

    @rule(n=groups)
    def unset_container(self, n: int) -> None:
        one = self.ones[n]
        if one.is_open:
            busy = -errno.EBUSY if one.given and one.container != COMPAT else 0
            result = self.request(one.group, abi.VFIO_GROUP_UNSET_CONTAINER)
            assert result == (-errno.EINVAL if one.container is None else busy)
            if not result:
                self.leave_container(one)

    @rule(n=groups)
    def get_status(self, n: int) -> None:
        one = self.ones[n]
        if one.is_open:
            status = abi.GroupStatus(argsz=8)
            address = ctypes.addressof(status)
            assert self.at(one.group, abi.VFIO_GROUP_GET_STATUS, address) == 0
            viable = 0 if one.in_iommufd else 1
            assert status.flags == (viable if one.container is None else 3)

    @rule(n=groups)
    def get_device(self, n: int) -> None:
        one = self.ones[n]
        if one.is_open:
            name = one.group.address.encode() + b"\0"
            result = self.request(one.group, abi.VFIO_GROUP_GET_DEVICE_FD, name)
            if one.container is None or one.container not in self.ready | {COMPAT}:
                assert result == -errno.EINVAL
            else:
                assert result > 0
                one.in_iommufd |= one.container == COMPAT and not one.given
                one.given.append(self.caller.files.pop(result))

    @rule(n=groups)
    def close_device(self, n: int) -> None:
        one = self.ones[n]
        if one.given:
            one.given.pop(0).release()
            self.left(one)

    # The container.

    @rule(c=containers)
    def set_iommu(self, c: int) -> None:
        if c == COMPAT:
            result = self.at(self.iommufd, abi.VFIO_SET_IOMMU, 3)
            assert result == (0 if self.had_group else -errno.ENODEV)
            return
        refused = not self.members(c) or c in self.ready
        result = self.at(self.caller.containers[NUMBERS[c]], abi.VFIO_SET_IOMMU, 3)
        assert result == (-errno.EINVAL if refused else 0)
        if not refused:
            self.ready.add(c)

    # The character device.

    @rule(n=groups)
    def open_node(self, n: int) -> None:
        self.ones[n].nodes.append(self.ones[n].served.open())

    @precondition(lambda self: any(one.nodes for one in self.ones))
    @rule(n=groups, which=st.integers(0, 3))
    def bind(self, n: int, which: int) -> None:
        one = self.ones[n]
        if which < len(one.nodes):
            file = one.nodes[which]
            result = self.request(file, vfio.VFIO_DEVICE_BIND_IOMMUFD, words(16, 0, IOMMUFD, 0))
            if one.is_held:
                assert result == -errno.EBUSY
            elif one.bound is not None:
                assert result == -errno.EINVAL
            else:
                assert result == 0
                one.bound = file

    @rule(n=groups, which=st.integers(0, 3))
    def close_node(self, n: int, which: int) -> None:
        one = self.ones[n]
        if which < len(one.nodes):
            file = one.nodes.pop(which)
            file.release()
            if file is one.bound:
                one.bound = None

    @invariant()
    def devices_reach_what_their_container_maps_and_nothing_else(self) -> None:
        for one in self.ones:
            users = len(one.given) or int(one.bound is not None)
            assert one.served.users == users
            in_use = one.container if one.container in self.ready else None
            space = one.device.dma.space  # as a bus master, which it is when its user says so
            if one.in_iommufd:
                assert space is compat_ioas(self.iommufd).space
            elif in_use is None:
                assert space is None
            else:
                iommu = self.caller.containers[NUMBERS[in_use]].iommu
                assert iommu is not None
                assert space is iommu.table.space


Lifecycle.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
TestLifecycle = Lifecycle.TestCase
