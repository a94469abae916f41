/*
 * What narrows an IO address space of an iommufd, what a program makes sure of, and options.
 */
#include "iommufd.h"

#include <linux/capability.h>
#include <sys/syscall.h>

#define IOMMU_IOAS_ALLOW_IOVAS 0x3B82
#define IOMMU_OPTION 0x3B87
#define IOMMU_VFIO_IOAS 0x3B88

struct iova_range { uint64_t start, last; };
struct iova_ranges {
	uint32_t size, ioas_id, num_iovas, reserved;
	uint64_t allowed_iovas, out_iova_alignment;
};
struct allow_iovas { uint32_t size, ioas_id, num_iovas, reserved; uint64_t allowed_iovas; };
struct option { uint32_t size, option_id; uint16_t op, reserved; uint32_t object_id; uint64_t val64; };
struct vfio_ioas { uint32_t size, ioas_id; uint16_t op, reserved; };

enum { RLIMIT_MODE, HUGE_PAGES };
enum { OP_SET, OP_GET };
enum { VFIO_IOAS_GET, VFIO_IOAS_SET, VFIO_IOAS_CLEAR };

#define WINDOW 0xFEE00000ull	/* where message signalled interrupts go on x86 */

static void say_ranges(const char *what)
{
	struct iova_range ranges[16];
	struct iova_ranges argument = {
		.size = 32, .ioas_id = ioas, .num_iovas = 16, .allowed_iovas = (uintptr_t)ranges,
	};

	need(!ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &argument), "IOVA_RANGES");
	say("%s: alignment %llu", what, (unsigned long long)argument.out_iova_alignment);
	for (uint32_t at = 0; at < argument.num_iovas; at++)
		say("  %#llx to %#llx", (unsigned long long)ranges[at].start,
		    (unsigned long long)ranges[at].last);
}

static void say_detach(void)
{
	say("DETACH = %s", outcome(ioctl(dev, DEVICE_DETACH_IOMMUFD_PT, &(struct attach){ .argsz = 8 })));
}

static void section_narrowing(void)
{
	uint32_t table;

	begin();
	say_ranges("nobody uses it");
	say("HWPT_ALLOC = %s", outcome(new_hwpt(0, &table)));
	say_ranges("a page table");
	say("ATTACH = %s", outcome(attach(table, NULL)));
	say_ranges("a device");
	say("ATTACH elsewhere = %s", outcome(attach(new_ioas(), NULL)));
	say_ranges("a page table");
	say("DESTROY = %s", outcome(destroy(table)));
	say_ranges("nobody uses it");
	say("ATTACH to the IOAS = %s", outcome(attach(ioas, NULL)));
	say_ranges("a device");
	close(dev);
	say_ranges("a device was closed");
	close(iommufd);
}

/* Map before anything is attached; see who minds. */
static void say_conflict(const char *what, char *memory, uint64_t length, uint64_t iova)
{
	uint32_t table;

	say("%s: IOAS_MAP = %s", what, outcome(map_at(ALL, memory, length, iova)));
	say("%s: ATTACH = %s", what, outcome(attach(ioas, NULL)));
	say_detach();
	say("%s: HWPT_ALLOC = %s", what, outcome(new_hwpt(0, &table)));
	need(!unmap(0, UINT64_MAX), "IOAS_UNMAP");
	destroy(table);
}

static void section_conflicts(void)
{
	char *memory = anonymous(2 * PAGE);

	begin();
	say_conflict("whole pages", memory, PAGE, BUS);
	say_conflict("half a page", memory, PAGE / 2, BUS);
	say_conflict("an iova inside a page", memory, PAGE, BUS + 8);
	say_conflict("memory inside a page", memory + 8, PAGE, BUS);
	say_conflict("the interrupts' window", memory, PAGE, WINDOW);
	say_conflict("beyond 48 bits", memory, PAGE, 1ull << 48);
	say("ATTACH to the IOAS = %s", outcome(attach(ioas, NULL)));
	say("half a page = %s", outcome(map_at(ALL, memory, PAGE / 2, BUS)));
	say("the interrupts' window = %s", outcome(map_at(ALL, memory, PAGE, WINDOW)));
	say("beyond 48 bits = %s", outcome(map_at(ALL, memory, PAGE, 1ull << 48)));
	end();
}

static long allow(const struct iova_range *ranges, uint32_t count)
{
	struct allow_iovas argument = { 24, ioas, count, 0, (uintptr_t)ranges };

	return ioctl(iommufd, IOMMU_IOAS_ALLOW_IOVAS, &argument);
}

static void section_allow_iovas(void)
{
	struct iova_range two[2] = { { 0x8000, 0x8FFF }, { 0x10000, 0x11FFF } };
	struct iova_range overlap[2] = { { 0x8000, 0x8FFF }, { 0x7000, 0x8000 } };
	struct iova_range empty = { 5, 5 }, window = { WINDOW, WINDOW + 1 }, all = { 0, UINT64_MAX };
	struct allow_iovas argument = { .size = 23 };
	char *memory = anonymous(PAGE);

	begin();
	say("size 23 = %s", outcome(ioctl(iommufd, IOMMU_IOAS_ALLOW_IOVAS, &argument)));
	argument = (struct allow_iovas){ 24, 9999, 1, 1, (uintptr_t)&empty };
	say("reserved field set = %s", outcome(ioctl(iommufd, IOMMU_IOAS_ALLOW_IOVAS, &argument)));
	argument.reserved = 0;
	say("unknown id = %s", outcome(ioctl(iommufd, IOMMU_IOAS_ALLOW_IOVAS, &argument)));
	say("ranges nowhere = %s", outcome(allow(nowhere, 1)));
	say("one byte = %s", outcome(allow(&empty, 1)));
	say("ranges that overlap = %s", outcome(allow(overlap, 2)));
	say("the second half nowhere = %s", outcome(allow(at_edge(two, 32, 24), 2)));
	say("everything = %s", outcome(allow(&all, 1)));
	say("ATTACH = %s", outcome(attach(ioas, NULL)));
	say("the interrupts' window = %s", outcome(allow(&window, 1)));
	say("ATTACH = %s", outcome(attach(ioas, NULL)));
	say("none = %s", outcome(allow(NULL, 0)));
	say("ATTACH = %s", outcome(attach(ioas, NULL)));
	say("the interrupts' window = %s", outcome(allow(&window, 1)));
	argument = (struct allow_iovas){ 24, ioas, 2, 0, (uintptr_t)two };
	say("two, from read-only memory = %s",
	    outcome(ioctl(iommufd, IOMMU_IOAS_ALLOW_IOVAS, read_only(&argument, 24))));
	for (int at = 0; at < 4; at++) {
		struct ioas_map map = {
			40, WRITEABLE | READABLE, ioas, 0, (uintptr_t)memory, PAGE, 0,
		};
		long result = ioctl(iommufd, IOMMU_IOAS_MAP, &map);

		say("anywhere = %s, iova %#llx", outcome(result), (unsigned long long)map.iova);
	}
	say("elsewhere = %s", outcome(map_at(ALL, memory, PAGE, BUS)));
	end();
}

static long say_option(const char *what, struct option argument)
{
	long result;

	argument.size = 24;
	result = ioctl(iommufd, IOMMU_OPTION, &argument);
	say("%s = %s, value %llu", what, outcome(result), (unsigned long long)argument.val64);
	return result;
}

/* Whoever runs this: be a program that may not exceed its limits. */
static void give_up_cap_sys_resource(void)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];

	need(!syscall(SYS_capget, &header, data), "capget");
	data[0].effective &= ~(1u << CAP_SYS_RESOURCE);
	need(!syscall(SYS_capset, &header, data), "capset");
}

static void section_option(void)
{
	struct option argument = { .size = 23 };
	char *memory = anonymous(PAGE);

	begin();
	give_up_cap_sys_resource();
	say("size 23 = %s", outcome(ioctl(iommufd, IOMMU_OPTION, &argument)));
	say_option("reserved field set", (struct option){ .option_id = 99, .reserved = 1 });
	say_option("unknown option", (struct option){ .option_id = 2, .op = OP_GET });
	say_option("RLIMIT_MODE of an object", (struct option){ .op = OP_GET, .object_id = ioas });
	say_option("RLIMIT_MODE, unknown operation", (struct option){ .op = 2 });
	say_option("RLIMIT_MODE GET", (struct option){ .op = OP_GET, .val64 = 7 });
	say_option("RLIMIT_MODE SET, as anybody", (struct option){ .op = OP_SET, .val64 = 7 });
	argument = (struct option){ .option_id = HUGE_PAGES, .op = 2, .object_id = 9999 };
	say_option("HUGE_PAGES of nothing", argument);
	argument.object_id = devid;
	say_option("HUGE_PAGES of the device", argument);
	argument.object_id = ioas;
	say_option("HUGE_PAGES, unknown operation", argument);
	argument.op = OP_GET;
	say_option("HUGE_PAGES GET", argument);
	argument.size = 24;
	say("HUGE_PAGES GET in read-only memory = %s",
	    outcome(ioctl(iommufd, IOMMU_OPTION, read_only(&argument, 24))));
	argument.op = OP_SET;
	argument.val64 = 2;
	say_option("HUGE_PAGES SET 2", argument);
	argument.val64 = 0;
	need(!map_at(ALL, memory, 8, BUS), "IOAS_MAP");
	say_option("HUGE_PAGES off, with 8 bytes mapped", argument);
	need(!unmap(BUS, 8), "IOAS_UNMAP");
	say_option("HUGE_PAGES off", argument);
	say_ranges("without huge pages");
	say("8 bytes = %s", outcome(map_at(ALL, memory, 8, BUS)));
	argument.val64 = 1;
	say_option("HUGE_PAGES on", argument);
	need(!attach(ioas, NULL) && !map_at(ALL, memory, PAGE, BUS), "a device with memory");
	argument.val64 = 0;
	say_option("HUGE_PAGES off, with memory mapped for a device", argument);
	argument.op = OP_GET;
	say_option("HUGE_PAGES GET", argument);
	end();
}

static void say_vfio_ioas(const char *what, struct vfio_ioas argument)
{
	long result;

	argument.size = 12;
	result = ioctl(iommufd, IOMMU_VFIO_IOAS, &argument);
	say("%s = %s, the IOAS: %s", what, outcome(result), yes_no(argument.ioas_id == ioas));
}

static void section_vfio_ioas(void)
{
	struct vfio_ioas argument = { .size = 11 };

	begin();
	say("size 11 = %s", outcome(ioctl(iommufd, IOMMU_VFIO_IOAS, &argument)));
	say_vfio_ioas("reserved field set", (struct vfio_ioas){ .op = 99, .reserved = 1 });
	say_vfio_ioas("unknown operation", (struct vfio_ioas){ .op = 3 });
	say_vfio_ioas("GET of none", (struct vfio_ioas){ .op = VFIO_IOAS_GET });
	say_vfio_ioas("SET to nothing", (struct vfio_ioas){ .op = VFIO_IOAS_SET, .ioas_id = 9999 });
	say_vfio_ioas("SET to the device", (struct vfio_ioas){ .op = VFIO_IOAS_SET, .ioas_id = devid });
	argument = (struct vfio_ioas){ .size = 12, .op = VFIO_IOAS_SET, .ioas_id = ioas };
	say("SET in read-only memory = %s",
	    outcome(ioctl(iommufd, IOMMU_VFIO_IOAS, read_only(&argument, 12))));
	say_vfio_ioas("GET", (struct vfio_ioas){ .op = VFIO_IOAS_GET });
	argument.op = VFIO_IOAS_GET;
	say("GET in read-only memory = %s",
	    outcome(ioctl(iommufd, IOMMU_VFIO_IOAS, read_only(&argument, 12))));
	say_vfio_ioas("CLEAR", (struct vfio_ioas){ .op = VFIO_IOAS_CLEAR });
	say_vfio_ioas("GET of none", (struct vfio_ioas){ .op = VFIO_IOAS_GET });
	say_vfio_ioas("SET", (struct vfio_ioas){ .op = VFIO_IOAS_SET, .ioas_id = ioas });
	say("DESTROY = %s", outcome(destroy(ioas)));
	say_vfio_ioas("GET of what is gone", (struct vfio_ioas){ .op = VFIO_IOAS_GET });
	end();
}

static const struct section sections[] = {
	{ "what narrows", section_narrowing },
	{ "what is in the way", section_conflicts },
	{ "ALLOW_IOVAS", section_allow_iovas },
	{ "OPTION", section_option },
	{ "VFIO_IOAS", section_vfio_ioas },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	return run_sections(sections, argc, argv);
}
