/*
 * An iommufd in the place of a container: groups that are put into it, and a container's requests
 * on it. vfio0, commanded, writes 64 bytes and reads 16 wherever it is told to.
 */
#include "group.h"

#define IOMMU_VFIO_IOAS 0x3B88
#define READ_WRITE (MAP_READ | MAP_WRITE)

struct vfio_ioas { uint32_t size, ioas_id; uint16_t op, reserved; };

/* What the sections work with. */
static int iommufd, group, dev;
static char *memory;

/* A group in an iommufd. */
static void enter(void)
{
	iommufd = open_iommu();
	group = open_group(0);
	need(!set_container(group, iommufd), "SET_CONTAINER");
}

/* ... and its device. */
static void begin(void)
{
	enter();
	dev = device_fd(group, NAME_0);
	need(dev >= 0, "GET_DEVICE_FD");
	enable_dma(dev);
	memory = anonymous(PAGES * PAGE);
}

static void end(void)
{
	close(dev);
	close(group);
	close(iommufd);
	munmap(memory, PAGES * PAGE);
}

static uint32_t vfio_ioas(void)
{
	struct vfio_ioas argument = { 12, 0, 0, 0 };

	return ioctl(iommufd, IOMMU_VFIO_IOAS, &argument) ? 0 : argument.ioas_id;
}

static void say_status(const char *when)
{
	struct group_status status = { 8, 0 };

	need(!ioctl(group, GROUP_GET_STATUS, &status), "GET_STATUS");
	say("status %s: %u", when, status.flags);
}

static long map(uint64_t iova, uint64_t size)
{
	return map_dma(iommufd, READ_WRITE, memory + (iova - BUS), iova, size);
}

#define dma_write(iova) dma(dev, 0x18, iova)

static void section_alone(void)
{
	struct info info = { .argsz = 24 };

	iommufd = open_iommu();
	say("GET_API_VERSION = %s", outcome(ioctl(iommufd, GET_API_VERSION)));
	for (unsigned long number = 0; number < 12; number++)
		say("CHECK_EXTENSION %lu = %s", number,
		    outcome(ioctl(iommufd, CHECK_EXTENSION, number)));
	say("SET_IOMMU 0 = %s", outcome(ioctl(iommufd, SET_IOMMU, 0)));
	say("SET_IOMMU 3 = %s", outcome(ioctl(iommufd, SET_IOMMU, TYPE1v2)));
	say("GET_INFO = %s", outcome(ioctl(iommufd, TYPE1_GET_INFO, &info)));
	say("GET_INFO nowhere = %s", outcome(ioctl(iommufd, TYPE1_GET_INFO, nowhere)));
	say("MAP_DMA = %s", outcome(map_dma(iommufd, READ_WRITE, nowhere, BUS, PAGE)));
	say("MAP_DMA with a new address = %s",
	    outcome(map_dma(iommufd, MAP_VADDR, nowhere, BUS, PAGE)));
	say("UNMAP_DMA = %s", outcome(unmap_dma(iommufd, 0, BUS, PAGE)));
	say("UNMAP_DMA with a bitmap = %s", outcome(unmap_dma(iommufd, UNMAP_BITMAP, BUS, PAGE)));
	say("DIRTY_PAGES = %s", outcome(ioctl(iommufd, TYPE1_DIRTY_PAGES, nowhere)));
	say("GROUP_GET_STATUS = %s", outcome(ioctl(iommufd, GROUP_GET_STATUS, nowhere)));
	close(iommufd);
}

static void section_set_container(void)
{
	int container = open_container();
	uint32_t first;

	enter();
	first = vfio_ioas();
	say("an IOAS: %s", yes_no(first));
	say_status("in it");
	say("SET_CONTAINER again = %s", outcome(set_container(group, iommufd)));
	say("SET_CONTAINER to a container = %s", outcome(set_container(group, container)));
	say("UNSET_CONTAINER = %s", outcome(ioctl(group, GROUP_UNSET_CONTAINER)));
	say_status("outside");
	say("the IOAS is there still: %s", yes_no(vfio_ioas() == first));
	say("UNSET_CONTAINER again = %s", outcome(ioctl(group, GROUP_UNSET_CONTAINER)));
	say("GET_DEVICE_FD outside = %s", outcome(device_fd(group, NAME_0)));
	say("SET_CONTAINER = %s", outcome(set_container(group, iommufd)));
	say("the same IOAS: %s", yes_no(vfio_ioas() == first));
	close(group);
	group = open_group(0);
	say_status("after the last close");
	say("to a container = %s", outcome(set_container(group, container)));
	close(group);
	close(container);
	close(iommufd);
}

static void section_device(void)
{
	int other;
	struct { uint32_t size, id; } destroy = { 8, 0 };

	enter();
	say("GET_DEVICE_FD without SET_IOMMU = %s", fd_text(dev = device_fd(group, NAME_0)));
	say("another one = %s", fd_text(other = device_fd(group, NAME_0)));
	destroy.id = vfio_ioas();
	say("DESTROY of the IOAS = %s", outcome(ioctl(iommufd, IOMMU_DESTROY, &destroy)));
	say("UNSET_CONTAINER while it is open = %s", outcome(ioctl(group, GROUP_UNSET_CONTAINER)));
	say_status("outside");
	say("GET_DEVICE_FD outside = %s", outcome(device_fd(group, NAME_0)));
	say("RESET = %s", outcome(ioctl(dev, DEVICE_RESET)));
	close(dev);
	close(other);
	say("DESTROY of the IOAS = %s", outcome(ioctl(iommufd, IOMMU_DESTROY, &destroy)));
	say_status("outside, with all closed");
	say("SET_CONTAINER = %s", outcome(set_container(group, iommufd)));
	destroy.id = vfio_ioas();
	say("DESTROY of the new IOAS = %s", outcome(ioctl(iommufd, IOMMU_DESTROY, &destroy)));
	say("GET_DEVICE_FD without an IOAS = %s", outcome(device_fd(group, NAME_0)));
	close(group);
	close(iommufd);
}

static void section_set_iommu(void)
{
	static const unsigned long types[] = { 0, 2, 4, 6, 8, 9, 10, 1ul << 32 | 3, 3, 3, 1, 3 };

	enter();
	for (size_t at = 0; at < sizeof(types) / sizeof(types[0]); at++)
		say("SET_IOMMU %#lx = %s", types[at], outcome(ioctl(iommufd, SET_IOMMU, types[at])));
	say("CHECK_EXTENSION 4 = %s", outcome(ioctl(iommufd, CHECK_EXTENSION, 4ul)));
	close(group);
	close(iommufd);
}

static void say_info(uint32_t argsz)
{
	struct info info = { .argsz = argsz };
	const uint32_t *words = (void *)info.rest;
	long result;

	memset(&info.cap_offset, 0xEE, sizeof(info) - 16);
	result = ioctl(iommufd, TYPE1_GET_INFO, &info);
	say("argsz %u = %s, argsz %u flags %u pgsizes %#llx cap_offset %#x", argsz, outcome(result),
	    info.argsz, info.flags, (unsigned long long)info.iova_pgsizes, info.cap_offset);
	say("behind argsz %u: %#x, %#x, and %#x", argsz, words[0], words[1], words[4]);
}

static void section_info(void)
{
	struct info info = { .argsz = 15 };

	begin();
	say("nowhere = %s", outcome(ioctl(iommufd, TYPE1_GET_INFO, nowhere)));
	say("cut at 8 bytes = %s", outcome(ioctl(iommufd, TYPE1_GET_INFO, at_edge(&info, 16, 8))));
	say("argsz 15 = %s", outcome(ioctl(iommufd, TYPE1_GET_INFO, &info)));
	say_info(16);
	say_info(24);
	say_info(35);
	say_info(39);
	say_info(40);
	say_info(87);
	say_info(88);
	info.argsz = sizeof(info);
	need(!ioctl(iommufd, TYPE1_GET_INFO, &info), "GET_INFO");
	for (uint32_t at = info.cap_offset; at;) {
		const struct cap *header = (void *)((char *)&info + at);
		const struct cap_avail *avail = (void *)header;
		const struct cap_ranges *ranges = (void *)header;

		if (header->id == 3)
			say("available mappings, version %u: %u", header->version, avail->avail);
		else
			say("capability %u, version %u: %u", header->id, header->version, ranges->count);
		for (uint32_t n = 0; header->id == 1 && n < ranges->count; n++)
			say("from %#llx to %#llx", (unsigned long long)ranges->at[n].start,
			    (unsigned long long)ranges->at[n].end);
		at = header->next;
	}
	end();
}

static void say_map(const char *what, struct dma_map argument)
{
	say("%s = %s", what, outcome(ioctl(iommufd, TYPE1_MAP_DMA, &argument)));
}

static void section_map(void)
{
	uint64_t va, end_of_all = -PAGE;
	struct dma_map argument = { 32, READ_WRITE, 0, BUS, PAGE };

	begin();
	va = (uintptr_t)memory;
	say("nowhere = %s", outcome(ioctl(iommufd, TYPE1_MAP_DMA, nowhere)));
	say("cut at 24 bytes = %s", outcome(ioctl(iommufd, TYPE1_MAP_DMA, at_edge(&argument, 32, 24))));
	say_map("argsz 31", (struct dma_map){ 31, READ_WRITE, va, BUS, PAGE });
	say_map("a new address", (struct dma_map){ 32, MAP_VADDR, va, BUS, PAGE });
	say_map("unknown flag", (struct dma_map){ 32, 8 | READ_WRITE, va, BUS, PAGE });
	say_map("size 0", (struct dma_map){ 32, READ_WRITE, va, BUS, 0 });
	say_map("vaddr + size too large", (struct dma_map){ 32, READ_WRITE, end_of_all, BUS, 2 * PAGE });
	say_map("iova + size too large", (struct dma_map){ 32, READ_WRITE, va, end_of_all, 2 * PAGE });
	say_map("iova inside a page", (struct dma_map){ 32, READ_WRITE, va, BUS + 8, PAGE });
	say_map("size 100", (struct dma_map){ 32, READ_WRITE, va, BUS + 16 * PAGE, 100 });
	say_map("reserved for interrupts", (struct dma_map){ 32, READ_WRITE, va, 0xFEE00000, PAGE });
	say_map("memory that is not there", (struct dma_map){ 32, READ_WRITE, 4096, BUS + 32 * PAGE, PAGE });
	say_map("a mapping that nobody may use", (struct dma_map){ 32, 0, va, BUS, PAGE });
	say_map("the same iova", (struct dma_map){ 32, READ_WRITE, va, BUS, PAGE });
	say_map("over it", (struct dma_map){ 32, READ_WRITE, va, BUS - PAGE, 3 * PAGE });
	say_map("argsz 1000", (struct dma_map){ 1000, READ_WRITE, va + PAGE, BUS + PAGE, 2 * PAGE });
	say_map("iova 0", (struct dma_map){ 32, READ_WRITE, va, 0, PAGE });
	say("DMA write to what nobody may use = %s", failed(dma_write(BUS)));
	say("DMA write = %s", failed(dma_write(BUS + PAGE)));
	say("it is there: %s", written(memory + PAGE));
	end();
}

static void say_unmap(const char *what, uint32_t argsz, uint32_t flags, uint64_t iova, uint64_t size)
{
	struct dma_unmap argument = { .argsz = argsz, .flags = flags, .iova = iova, .size = size };
	long result = ioctl(iommufd, TYPE1_UNMAP_DMA, &argument);

	say("%s = %s, size %#llx", what, outcome(result), (unsigned long long)argument.size);
}

static void section_unmap(void)
{
	struct dma_unmap argument = { .argsz = 24, .iova = BUS, .size = PAGE };

	begin();
	need(!map(BUS, PAGE) && !map(BUS + PAGE, 4 * PAGE) && !map(BUS + 8 * PAGE, PAGE), "MAP_DMA");
	say("nowhere = %s", outcome(ioctl(iommufd, TYPE1_UNMAP_DMA, nowhere)));
	say_unmap("argsz 23", 23, 0, BUS, PAGE);
	say_unmap("an address only", 24, UNMAP_VADDR, BUS, PAGE);
	say_unmap("with a bitmap", 48, UNMAP_BITMAP, BUS, PAGE);
	say_unmap("size 0", 24, 0, BUS, 0);
	say_unmap("iova + size too large", 24, 0, -PAGE, 2 * PAGE);
	say_unmap("all, and an iova", 24, UNMAP_ALL, BUS, 0);
	say_unmap("all, and a size", 24, UNMAP_ALL, 0, PAGE);
	say_unmap("the beginning of a mapping", 24, 0, BUS + PAGE, PAGE);
	say_unmap("the middle of a mapping", 24, 0, BUS + 2 * PAGE, PAGE);
	say_unmap("the end of a mapping", 24, 0, BUS + 4 * PAGE, PAGE);
	say_unmap("one, and half of another", 24, 0, BUS, 2 * PAGE);
	say_unmap("the one", 24, 0, BUS, PAGE);
	need(!map(BUS, PAGE), "MAP_DMA");
	say_unmap("nothing is there", 24, 0, BUS + 32 * PAGE, PAGE);
	say_unmap("the last page of all", 24, 0, -PAGE, PAGE);
	say_unmap("one", 24, 0, BUS, PAGE);
	say("DMA = %s", failed(dma_write(BUS)));
	say_unmap("two, with gaps", 24, 0, BUS, 16 * PAGE);
	need(!map(BUS, PAGE) && !map(BUS + PAGE, 4 * PAGE), "MAP_DMA");
	say_unmap("all", 24, UNMAP_ALL, 0, 0);
	say_unmap("all, when there is none", 24, UNMAP_ALL, 0, 0);
	need(!map(BUS, PAGE), "MAP_DMA");
	say("read-only memory = %s",
	    outcome(ioctl(iommufd, TYPE1_UNMAP_DMA, read_only(&argument, 24))));
	say("it is gone all the same: DMA = %s", failed(dma_write(BUS)));
	end();
}

static void section_version_1(void)
{
	begin();
	say("SET_IOMMU 1 = %s", outcome(ioctl(iommufd, SET_IOMMU, TYPE1)));
	need(!map(BUS, 5 * PAGE), "MAP_DMA");
	say_unmap("the middle of a mapping", 24, 0, BUS + 2 * PAGE, PAGE);
	say("DMA before it = %s", failed(dma_write(BUS + PAGE)));
	say("it is there: %s", written(memory + PAGE));
	say("DMA to it = %s", failed(dma_write(BUS + 2 * PAGE)));
	say("DMA behind it = %s", failed(dma_write(BUS + 3 * PAGE)));
	say("it is there: %s", written(memory + 3 * PAGE));
	say_unmap("around the hole", 24, 0, BUS + PAGE, 3 * PAGE);
	say_unmap("the hole", 24, 0, BUS + 2 * PAGE, PAGE);
	say_unmap("all", 24, UNMAP_ALL, 0, 0);
	end();
}

static const struct section sections[] = {
	{ "alone", section_alone },
	{ "SET_CONTAINER", section_set_container },
	{ "a device", section_device },
	{ "SET_IOMMU", section_set_iommu },
	{ "GET_INFO", section_info },
	{ "MAP_DMA", section_map },
	{ "UNMAP_DMA", section_unmap },
	{ "version 1", section_version_1 },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	return run_sections(sections, argc, argv);
}
