"""Every struct and constant of `vfiomig.abi` against C: gcc's view of it and a parser's.

One C program, compiled once, prints what gcc makes of two sources: the declarations beside this
file (``declared``: everything must be there) and the kernel headers of this machine (``machine``:
whatever they have, since they may be older).
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from dissect.cstruct import cstruct  # type: ignore[import-untyped]  # it has no py.typed

import vfiomig.abi
from vfiomig.abi.syscalls import X86_64
from vfiomig.abi.uapi import UapiStruct

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
LAYOUTS = (HERE / "abi_layouts.h").read_text()
CONSTANTS = (HERE / "abi_constants.h").read_text()

MODULES = [
    importlib.import_module(f"vfiomig.abi.{info.name}")
    for info in pkgutil.iter_modules(vfiomig.abi.__path__)
]
PYTHON_CONSTANTS = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, int) and re.match(r"VFIO_|(?!TYPE_CHECKING)[A-Z][A-Z0-9_]+$", name)
}
DECLARED_CONSTANTS = dict(re.findall(r"^#define (\w+) (.+)$", CONSTANTS, flags=re.MULTILINE))
# The name under which the machine's headers have it, where that is another one.
C_CONSTANT = {"X32_SYSCALL_BIT": "__X32_SYSCALL_BIT"}

MACHINE_HEADERS = """
#include <linux/aio_abi.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/ioctl.h>
#include <linux/kvm.h>
#include <linux/pci_regs.h>
#include <linux/prctl.h>
#include <linux/seccomp.h>
#include <linux/vfio.h>
#if __has_include(<linux/iommufd.h>)
#include <linux/iommufd.h>
#endif
#include <asm/unistd.h>
"""


def _subclasses(cls: type[UapiStruct]) -> Iterator[type[UapiStruct]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


STRUCTS = sorted(
    (cls for cls in _subclasses(UapiStruct) if cls.__module__.startswith("vfiomig.")),
    key=lambda cls: cls.c_name,
)


@dataclass
class CSide:
    """What gcc printed: sizes, places (offset, size, signed), values, by C name."""

    sizes: dict[str, int] = field(default_factory=dict)
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)


def _is_scalar(cls: type[UapiStruct], member: str) -> bool:
    return issubclass(dict(cls._fields_)[member], ctypes._SimpleCData)


def _body(text: str, c_name: str) -> str | None:
    """Cut the members of a struct out of preprocessed C."""
    match = re.search(rf"\bstruct {c_name}\s*{{", text)
    if match is None:
        return None
    depth, end = 1, match.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[match.end() : end]


def _c_member(body: str, member: str) -> str | None:
    """The member as C calls it: with two underscores before it, if it is reserved."""
    for name in (member, f"__{member}"):
        if re.search(rf"\b{name}\b", body):
            return name
    return None


def _probe_struct(side: str, tag: str, cls: type[UapiStruct], body: str) -> Iterator[str]:
    """C statements that print where each member lies; the size too, unless *body* is older."""
    names = {member: _c_member(body, member) for member, *_ in cls._fields_}
    if all(names.values()):
        yield f'printf("size {side} {cls.c_name} %zu\\n", sizeof(struct {tag}));'
    for member, name in names.items():
        if name is None:
            continue
        lvalue = f"((struct {tag} *)0)->{name}"
        # A pointer in the machine's header is a u64 of ours and has no sign to ask for.
        scalar = _is_scalar(cls, member) and not re.search(rf"\*\s*{name}\b", body)
        sign = f"(__typeof__({lvalue}))-1 < 0" if scalar else "0"
        yield (
            f'printf("place {side} {cls.c_name}.{member} %zu %zu %d\\n", '
            f"offsetof(struct {tag}, {name}), sizeof({lvalue}), {sign});"
        )


def _probe_source(machine: str) -> str:
    declared = re.sub(r"\bstruct (\w+)", r"struct declared_\1", LAYOUTS)
    lines: list[str] = []
    for cls in STRUCTS:
        ours, theirs = _body(LAYOUTS, cls.c_name), _body(machine, cls.c_name)
        if ours is not None:
            lines += _probe_struct("declared", f"declared_{cls.c_name}", cls, ours)
        if theirs is not None:
            lines += _probe_struct("machine", cls.c_name, cls, theirs)
    value = 'printf("value {} {} %llu\\n", (unsigned long long)({}));'
    for name, text in DECLARED_CONSTANTS.items():
        lines.append(value.format("declared", name, text))
    for name in PYTHON_CONSTANTS:
        if re.search(rf"\b{C_CONSTANT.get(name, name)}\b", machine):
            lines.append(value.format("machine", name, C_CONSTANT.get(name, name)))
    for name in X86_64:
        if re.search(rf"\b__NR_{name}\b", machine):
            lines.append(value.format("machine", f"__NR_{name}", f"__NR_{name}"))
    body = "\n".join(lines)
    return (
        f"#include <stdio.h>\n#include <stddef.h>\n{MACHINE_HEADERS}\n{declared}\n"
        f"int main(void)\n{{\n{body}\nreturn 0;\n}}\n"
    )


def _gcc(*args: str, text: str) -> str:
    try:
        done = subprocess.run(
            ["gcc", *args, "-x", "c", "-"], input=text, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.fail("gcc is missing: install gcc and libc6-dev, the tests compare with C")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def c(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CSide]:
    program = tmp_path_factory.mktemp("abi") / "probe"
    machine = _gcc("-E", "-dD", text=MACHINE_HEADERS)
    _gcc("-w", "-o", str(program), text=_probe_source(machine))
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    sides = {"declared": CSide(), "machine": CSide()}
    for line in printed.splitlines():
        what, side, name, *numbers = line.split()
        if what == "size":
            sides[side].sizes[name] = int(numbers[0])
        elif what == "place":
            offset, size, signed = map(int, numbers)
            sides[side].places[name] = (offset, size, signed)
        else:
            sides[side].values[name] = int(numbers[0])
    return sides


def _places(cls: type[UapiStruct]) -> dict[str, tuple[int, int, int]]:
    signed = {ctypes.c_int16, ctypes.c_int32, ctypes.c_int64}
    return {
        f"{cls.c_name}.{name}": (
            getattr(cls, name).offset,
            getattr(cls, name).size,
            int(kind in signed),
        )
        for name, kind, *_ in cls._fields_
    }


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: cls.c_name)
def test_struct_lies_in_memory_as_gcc_lays_it(cls: type[UapiStruct], c: dict[str, CSide]) -> None:
    assert c["declared"].sizes.get(cls.c_name) == cls.SIZE, "no C side, or another size"
    declared = c["declared"].places
    assert {name: declared.get(name) for name in _places(cls)} == _places(cls)
    for name, place in _places(cls).items():
        assert c["machine"].places.get(name, place) == place
    assert c["machine"].sizes.get(cls.c_name, cls.SIZE) == cls.SIZE


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: cls.c_name)
def test_struct_has_the_members_of_the_c_struct_and_no_others(cls: type[UapiStruct]) -> None:
    body = _body(LAYOUTS, cls.c_name)
    assert body is not None, f"declare struct {cls.c_name} in {HERE / 'abi_layouts.h'}"
    members = re.findall(r"(\w+)(?:\[\d+\])?;", body)
    assert members == [_c_member(body, name) for name, *_ in cls._fields_]


def test_no_c_struct_is_left_without_a_twin() -> None:
    declared = re.findall(r"^struct (\w+) {", LAYOUTS, flags=re.MULTILINE)
    assert sorted(declared) == [cls.c_name for cls in STRUCTS]


def test_every_constant_has_a_c_side_and_agrees_with_it(c: dict[str, CSide]) -> None:
    assert c["declared"].values == PYTHON_CONSTANTS


def test_constants_agree_with_the_machines_headers(c: dict[str, CSide]) -> None:
    ours = PYTHON_CONSTANTS | {f"__NR_{name}": number for name, number in X86_64.items()}
    assert c["machine"].values == {name: ours[name] for name in c["machine"].values}


def test_the_machines_headers_were_really_looked_at(c: dict[str, CSide]) -> None:
    # All of these are older than the oldest kernel that the tests run on.
    assert {
        "vfio_device_feature",
        "vfio_region_info",
        "vfio_irq_set",
        "vfio_iommu_type1_dma_map",
        "seccomp_notif",
        "sock_fprog",
        "kvm_device_attr",
    } <= c["machine"].sizes.keys()
    assert {"VFIO_DEVICE_FEATURE", "VFIO_DEVICE_STATE_V1_SAVING", "SECCOMP_IOCTL_NOTIF_RECV"} <= (
        c["machine"].values.keys()
    )
    assert {f"__NR_{name}" for name in X86_64} <= c["machine"].values.keys()


@pytest.fixture(scope="module")
def parsed() -> cstruct:
    text = "".join(
        f"typedef {kind} __{name};\n"
        for name, kind in {
            **{f"u{bits}": f"uint{bits}_t" for bits in (8, 16, 32, 64)},
            **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
        }.items()
    )
    reader = cstruct()
    reader.load(text + LAYOUTS, align=True)
    return reader


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: cls.c_name)
def test_struct_reads_the_same_values_as_a_c_parser(cls: type[UapiStruct], parsed: cstruct) -> None:
    theirs = getattr(parsed, cls.c_name)
    assert len(theirs) == cls.SIZE
    image = bytes((37 * n + 129) % 256 for n in range(cls.SIZE))
    _same_values(cls.parse(image), theirs(image))


def _same_values(ours: object, theirs: object) -> None:
    if isinstance(ours, UapiStruct):
        body = _body(LAYOUTS, type(ours).c_name)
        assert body is not None
        for name, *_ in ours._fields_:
            _same_values(getattr(ours, name), getattr(theirs, _c_member(body, name) or name))
    elif isinstance(ours, ctypes.Array):
        assert list(ours) == list(theirs)  # type: ignore[call-overload]  # a cstruct array
    else:
        assert ours == theirs
