/*
 * The type1 IOMMU of a container: what it tells of itself, mappings, and dirty pages. vfio0,
 * commanded, writes 64 bytes and reads 16 wherever it is told to; vfio1 is any other device.
 */
#include "group.h"

#define READ_WRITE (MAP_READ | MAP_WRITE)
#define START 1u
#define STOP_TRACKING 2u
#define GET_BITMAP 4u

struct cap_migration { struct cap header; uint32_t flags; uint64_t pgsizes, max_size; };
struct dirty { uint32_t argsz, flags; uint64_t iova, size; struct bitmap bitmap; };

/* What every section works with. */
static int container, group, dev;
static char *memory;

static void begin(unsigned long type)
{
	container = open_container();
	group = open_in(container, 0, type);
	dev = device_fd(group, NAME_0);
	need(dev >= 0, "GET_DEVICE_FD");
	enable_dma(dev);
	memory = anonymous(PAGES * PAGE);
}

static void end(void)
{
	close(dev);
	close(group);
	close(container);
	munmap(memory, PAGES * PAGE);
}

static long map(uint64_t iova, uint64_t size)
{
	return map_dma(container, READ_WRITE, memory + (iova - BUS), iova, size);
}

static long unmap(uint32_t flags, uint64_t iova, uint64_t size)
{
	return unmap_dma(container, flags, iova, size);
}

#define dma_write(iova) dma(dev, 0x18, iova)

static void say_info(uint32_t argsz)
{
	struct info info = { .argsz = argsz };
	long result;

	memset(&info.cap_offset, 0xEE, sizeof(info) - 16);
	result = ioctl(container, TYPE1_GET_INFO, &info);
	say("argsz %u = %s, argsz %u flags %u pgsizes %#llx cap_offset %#x", argsz, outcome(result),
	    info.argsz, info.flags, (unsigned long long)info.iova_pgsizes, info.cap_offset);
}

static void say_capability(const struct info *info, uint32_t offset)
{
	const void *at = (const char *)info + offset;
	const struct cap *header = at;
	const struct cap_migration *migration = at;
	const struct cap_avail *avail = at;
	const struct cap_ranges *ranges = at;

	if (header->id == 1) {
		say("ranges, version %u: %u", header->version, ranges->count);
		for (uint32_t n = 0; n < ranges->count; n++)
			say("from %#llx to %#llx", (unsigned long long)ranges->at[n].start,
			    (unsigned long long)ranges->at[n].end);
	} else if (header->id == 2)
		say("migration, version %u: flags %u pgsizes %#llx largest bitmap %#llx",
		    header->version, migration->flags, (unsigned long long)migration->pgsizes,
		    (unsigned long long)migration->max_size);
	else if (header->id == 3)
		say("available mappings, version %u: %u", header->version, avail->avail);
	else
		say("capability %u", header->id);
}

static void section_info(void)
{
	struct info info = { .argsz = 15 };

	begin(TYPE1v2);
	say("nowhere = %s", outcome(ioctl(container, TYPE1_GET_INFO, nowhere)));
	say("cut at 8 bytes = %s", outcome(ioctl(container, TYPE1_GET_INFO, at_edge(&info, 16, 8))));
	say("argsz 15 = %s", outcome(ioctl(container, TYPE1_GET_INFO, &info)));
	say_info(16);
	say_info(24);
	say_info(119);
	say_info(120);
	info.argsz = 16;
	say("read-only memory = %s",
	    outcome(ioctl(container, TYPE1_GET_INFO, read_only(&info, 16))));
	info.argsz = 120;
	say("no room for capabilities = %s",
	    outcome(ioctl(container, TYPE1_GET_INFO, at_edge(&info, 120, 100))));
	need(!map(BUS, PAGE) && !map(BUS + PAGE, PAGE), "MAP_DMA");
	info.argsz = sizeof(info);
	need(!ioctl(container, TYPE1_GET_INFO, &info), "GET_INFO");
	for (uint32_t at = info.cap_offset; at; at = ((struct cap *)((char *)&info + at))->next)
		say_capability(&info, at);
	end();
}

static void say_map(const char *what, struct dma_map argument)
{
	say("%s = %s", what, outcome(ioctl(container, TYPE1_MAP_DMA, &argument)));
}

static void section_map(void)
{
	uint64_t va, end_of_all = -PAGE;
	struct dma_map argument = { 32, READ_WRITE, 0, BUS, PAGE };
	char *odd;

	begin(TYPE1v2);
	va = (uintptr_t)memory;
	odd = anonymous(3 * PAGE);
	munmap(odd + PAGE, PAGE);
	say("nowhere = %s", outcome(ioctl(container, TYPE1_MAP_DMA, nowhere)));
	say("cut at 24 bytes = %s",
	    outcome(ioctl(container, TYPE1_MAP_DMA, at_edge(&argument, 32, 24))));
	say_map("argsz 31", (struct dma_map){ 31, READ_WRITE, va, BUS, PAGE });
	say_map("unknown flag", (struct dma_map){ 32, 8 | READ_WRITE, va, BUS, PAGE });
	say_map("nobody may use it", (struct dma_map){ 32, 0, va, BUS, PAGE });
	say_map("an access and a new address", (struct dma_map){ 32, 5, va, BUS, PAGE });
	say_map("size 0", (struct dma_map){ 32, READ_WRITE, va, BUS, 0 });
	say_map("size 100", (struct dma_map){ 32, READ_WRITE, va, BUS, 100 });
	say_map("iova inside a page", (struct dma_map){ 32, READ_WRITE, va, BUS + 8, PAGE });
	say_map("vaddr inside a page", (struct dma_map){ 32, READ_WRITE, va + 8, BUS, PAGE });
	say_map("iova + size too large", (struct dma_map){ 32, READ_WRITE, va, end_of_all, 2 * PAGE });
	say_map("vaddr + size too large", (struct dma_map){ 32, READ_WRITE, end_of_all, BUS, 2 * PAGE });
	say_map("iova beyond 48 bits", (struct dma_map){ 32, READ_WRITE, va, 1ull << 48, PAGE });
	say_map("the last page of all", (struct dma_map){ 32, READ_WRITE, va, end_of_all, PAGE });
	say_map("reserved for interrupts", (struct dma_map){ 32, READ_WRITE, va, 0xFEE00000, PAGE });
	say_map("memory that is not there", (struct dma_map){ 32, READ_WRITE, 4096, BUS, PAGE });
	say_map("memory with a hole",
		(struct dma_map){ 32, READ_WRITE, (uintptr_t)odd, BUS, 3 * PAGE });
	argument.vaddr = (uintptr_t)read_only("constant", 8);
	say_map("read-only memory, to be written", argument);
	argument.flags = MAP_READ;
	say_map("read-only memory, to be read", argument);
	say_map("the same iova", (struct dma_map){ 32, READ_WRITE, va, BUS, PAGE });
	say_map("the same iova, memory that is not there", (struct dma_map){ 32, READ_WRITE, 4096, BUS, PAGE });
	say_map("over it", (struct dma_map){ 32, READ_WRITE, va, BUS - PAGE, 3 * PAGE });
	say_map("over it, into what is reserved",
		(struct dma_map){ 32, READ_WRITE, va, BUS, 0xFEE00000 - BUS });
	say_map("argsz 1000", (struct dma_map){ 1000, READ_WRITE, va, BUS + PAGE, 2 * PAGE });
	say_map("write only", (struct dma_map){ 32, MAP_WRITE, va + 2 * PAGE, BUS + 3 * PAGE, PAGE });
	say_map("iova 0", (struct dma_map){ 32, READ_WRITE, va, 0, PAGE });
	memcpy(memory + PAGE - 8, "in two pages of ", 16);
	say("DMA read = %s", dma_text(dev, BUS + 2 * PAGE - 8));
	say("DMA read of the read-only page = %s", dma_text(dev, BUS));
	say("DMA write to it = %s", failed(dma_write(BUS)));
	say("DMA write = %s", failed(dma_write(BUS + PAGE)));
	say("it is there: %s", written(memory));
	say("DMA read of the page for writing = %s", dma_text(dev, BUS + 3 * PAGE));
	say("DMA write to it = %s", failed(dma_write(BUS + 3 * PAGE)));
	end();
}

static void say_unmap(const char *what, uint32_t argsz, uint32_t flags, uint64_t iova, uint64_t size)
{
	struct dma_unmap argument = { .argsz = argsz, .flags = flags, .iova = iova, .size = size };
	long result = ioctl(container, TYPE1_UNMAP_DMA, &argument);

	say("%s = %s, size %#llx", what, outcome(result), (unsigned long long)argument.size);
}

static void map_three(void)
{
	need(!map(BUS, PAGE) && !map(BUS + PAGE, 4 * PAGE) && !map(BUS + 8 * PAGE, PAGE), "MAP_DMA");
}

static void section_unmap(void)
{
	struct dma_unmap argument = { .argsz = 24, .iova = BUS, .size = PAGE };

	begin(TYPE1v2);
	map_three();
	say("nowhere = %s", outcome(ioctl(container, TYPE1_UNMAP_DMA, nowhere)));
	say("cut at 16 bytes = %s",
	    outcome(ioctl(container, TYPE1_UNMAP_DMA, at_edge(&argument, 24, 16))));
	say_unmap("argsz 23", 23, 0, BUS, PAGE);
	say_unmap("unknown flag", 24, 8, BUS, PAGE);
	say_unmap("size 0", 24, 0, BUS, 0);
	say_unmap("size 100", 24, 0, BUS, 100);
	say_unmap("iova inside a page", 24, 0, BUS + 8, PAGE);
	say_unmap("iova + size too large", 24, 0, -PAGE, 2 * PAGE);
	say_unmap("all, and an iova", 24, UNMAP_ALL, BUS, 0);
	say_unmap("all, and a size", 24, UNMAP_ALL, 0, PAGE);
	say_unmap("the beginning of a mapping", 24, 0, BUS + PAGE, PAGE);
	say_unmap("the middle of a mapping", 24, 0, BUS + 2 * PAGE, PAGE);
	say_unmap("the end of a mapping", 24, 0, BUS + 4 * PAGE, PAGE);
	say_unmap("one, and half of another", 24, 0, BUS, 2 * PAGE);
	say("DMA = %s", failed(dma_write(BUS)));
	say_unmap("nothing is there", 24, 0, BUS + 32 * PAGE, PAGE);
	say_unmap("the last page of all", 24, 0, -PAGE, PAGE);
	say_unmap("one", 24, 0, BUS, PAGE);
	say("DMA = %s", failed(dma_write(BUS)));
	say_unmap("again", 24, 0, BUS, PAGE);
	say_unmap("two, with gaps", 24, 0, BUS, 16 * PAGE);
	map_three();
	say_unmap("all", 24, UNMAP_ALL, 0, 0);
	say_unmap("all, when there is none", 24, UNMAP_ALL, 0, 0);
	map_three();
	say("read-only memory = %s",
	    outcome(ioctl(container, TYPE1_UNMAP_DMA, read_only(&argument, 24))));
	say("it is gone all the same: DMA = %s", failed(dma_write(BUS)));
	end();
}

static void section_version_1(void)
{
	uint64_t bits = 0;
	struct dirty dirty = { 8, START, 0, 0, { 0, 0, 0 } };
	struct dma_unmap with_bitmap = {
		48, UNMAP_BITMAP, BUS, PAGE, { PAGE, 8, (uintptr_t)&bits },
	};

	begin(TYPE1);
	map_three();
	say_unmap("the middle of a mapping", 24, 0, BUS + 2 * PAGE, 64 * PAGE);
	say("DMA = %s", failed(dma_write(BUS + PAGE)));
	say_unmap("the beginning of a mapping", 24, 0, BUS + PAGE, PAGE);
	say("DMA to its end = %s", failed(dma_write(BUS + 4 * PAGE)));
	need(unmap(UNMAP_ALL, 0, 0) == 2 * PAGE, "UNMAP_DMA");
	map_three();
	say_unmap("from before one into another", 24, 0, BUS - PAGE, 3 * PAGE);
	say_unmap("the rest", 24, 0, BUS, PAGES * PAGE);
	say("DIRTY_PAGES = %s", outcome(ioctl(container, TYPE1_DIRTY_PAGES, &dirty)));
	say("DIRTY_PAGES nowhere = %s", outcome(ioctl(container, TYPE1_DIRTY_PAGES, nowhere)));
	say("UNMAP with a bitmap = %s", outcome(ioctl(container, TYPE1_UNMAP_DMA, &with_bitmap)));
	end();
}

static void section_new_address(void)
{
	char *moved = anonymous(4 * PAGE);
	int other = open_group(1);

	begin(TYPE1v2);
	need(!map(BUS, PAGE) && !map(BUS + PAGE, 4 * PAGE), "MAP_DMA");
	say("a new address for one that has one = %s",
	    outcome(map_dma(container, MAP_VADDR, moved, BUS, PAGE)));
	say_unmap("half of the second", 24, UNMAP_VADDR, BUS + PAGE, PAGE);
	say_unmap("the address of the second", 24, UNMAP_VADDR, BUS + PAGE, 4 * PAGE);
	say_unmap("of all", 24, UNMAP_VADDR | UNMAP_ALL, 0, 0);
	say_unmap("where nothing is", 24, UNMAP_VADDR, BUS + 8 * PAGE, PAGE);
	say("DMA = %s", failed(dma_write(BUS + PAGE)));
	say("it is at the old address: %s", written(memory + PAGE));
	say("another group joins = %s", outcome(set_container(other, container)));
	say("nothing is there = %s", outcome(map_dma(container, MAP_VADDR, moved, 0, PAGE)));
	say("another size = %s", outcome(map_dma(container, MAP_VADDR, moved, BUS + PAGE, PAGE)));
	say("another iova = %s", outcome(map_dma(container, MAP_VADDR, moved, BUS, 4 * PAGE)));
	say("an ordinary mapping there = %s", outcome(map(BUS + PAGE, 4 * PAGE)));
	say("its new address = %s",
	    outcome(map_dma(container, MAP_VADDR, moved, BUS + PAGE, 4 * PAGE)));
	say("again = %s", outcome(map_dma(container, MAP_VADDR, moved, BUS + PAGE, 4 * PAGE)));
	say("DMA = %s", failed(dma_write(BUS + 2 * PAGE)));
	say("it is at the new address: %s", written(moved + PAGE));
	say("another group joins = %s", outcome(set_container(other, container)));
	say_unmap("all addresses", 24, UNMAP_VADDR | UNMAP_ALL, 0, 0);
	say_unmap("again", 24, UNMAP_VADDR | UNMAP_ALL, 0, 0);
	say("an address that is none = %s",
	    outcome(map_dma(container, MAP_VADDR, (void *)4096, BUS, PAGE)));
	say("DMA = %s", failed(dma_write(BUS)));
	say_unmap("the mappings", 24, UNMAP_ALL, 0, 0);
	say("map one again = %s", outcome(map(BUS + PAGE, 4 * PAGE)));
	say("a new address = %s",
	    outcome(map_dma(container, MAP_VADDR, moved, BUS + PAGE, 4 * PAGE)));
	close(other);
	end();
}

static long track(uint32_t flag)
{
	struct dirty argument = { .argsz = 8, .flags = flag };

	return ioctl(container, TYPE1_DIRTY_PAGES, &argument);
}

static long get(uint64_t iova, uint64_t size, uint64_t pgsize, uint64_t bytes, void *bitmap)
{
	struct dirty argument = {
		48, GET_BITMAP, iova, size, { pgsize, bytes, (uintptr_t)bitmap },
	};

	return ioctl(container, TYPE1_DIRTY_PAGES, &argument);
}

static void section_dirty_arguments(void)
{
	uint64_t bits[4] = { 0 };
	struct dirty argument = { 8, START, BUS, PAGE, { PAGE, 8, (uintptr_t)bits } };

	begin(TYPE1v2);
	need(!map(BUS, PAGE) && !map(BUS + PAGE, 4 * PAGE), "MAP_DMA");
	say("nowhere = %s", outcome(ioctl(container, TYPE1_DIRTY_PAGES, nowhere)));
	argument.argsz = 7;
	say("argsz 7 = %s", outcome(ioctl(container, TYPE1_DIRTY_PAGES, &argument)));
	say("no flag = %s", outcome(track(0)));
	say("unknown flag = %s", outcome(track(8)));
	say("START and STOP = %s", outcome(track(START | STOP_TRACKING)));
	say("STOP and GET = %s", outcome(track(STOP_TRACKING | GET_BITMAP)));
	say("STOP when it is off = %s", outcome(track(STOP_TRACKING)));
	say("GET when it is off = %s", outcome(get(BUS, PAGE, PAGE, 8, bits)));
	say("START = %s", outcome(track(START)));
	say("START again = %s", outcome(track(START)));
	argument.flags = GET_BITMAP;
	argument.argsz = 47;
	say("GET argsz 47 = %s", outcome(ioctl(container, TYPE1_DIRTY_PAGES, &argument)));
	argument.argsz = 48;
	say("GET cut at 40 bytes = %s",
	    outcome(ioctl(container, TYPE1_DIRTY_PAGES, at_edge(&argument, 48, 40))));
	say("GET iova + size too large = %s", outcome(get(-PAGE, 2 * PAGE, PAGE, 8, bits)));
	say("GET size 0 = %s", outcome(get(BUS, 0, PAGE, 8, bits)));
	say("GET size 100 = %s", outcome(get(BUS, 100, PAGE, 8, bits)));
	say("GET iova inside a page = %s", outcome(get(BUS + 8, PAGE, PAGE, 8, bits)));
	say("GET pgsize 0 = %s", outcome(get(BUS, PAGE, 0, 8, bits)));
	say("GET pgsize 8192 = %s", outcome(get(BUS, 2 * PAGE, 8192, 8, bits)));
	say("GET pgsize 2048 = %s", outcome(get(BUS, PAGE, 2048, 8, bits)));
	say("GET no room = %s", outcome(get(BUS, PAGE, PAGE, 0, bits)));
	say("GET too little room = %s", outcome(get(BUS, 65 * PAGE, PAGE, 8, bits)));
	say("GET too much room = %s", outcome(get(BUS, PAGE, PAGE, (1 << 28) + 8, bits)));
	say("GET to an address of the kernel = %s", outcome(get(BUS, PAGE, PAGE, 8, (void *)-4096l)));
	say("GET half of a mapping = %s", outcome(get(BUS, 2 * PAGE, PAGE, 8, bits)));
	say("GET half of a mapping, nowhere = %s", outcome(get(BUS, 2 * PAGE, PAGE, 8, nowhere)));
	say("GET nowhere = %s", outcome(get(BUS, PAGE, PAGE, 8, nowhere)));
	say("GET into read-only memory = %s", outcome(get(BUS, PAGE, PAGE, 8, read_only(bits, 8))));
	say("GET where nothing is mapped, nowhere = %s",
	    outcome(get(BUS + 32 * PAGE, PAGE, PAGE, 8, nowhere)));
	say("GET = %s", outcome(get(BUS, PAGE, PAGE, 8, bits)));
	say("STOP = %s", outcome(track(STOP_TRACKING)));
	say("GET = %s", outcome(get(BUS, PAGE, PAGE, 8, bits)));
	end();
}

static void say_dirty(const char *what, uint64_t iova, uint64_t size, uint64_t before)
{
	uint64_t bits[3] = { before, before, 0x5555 };
	long result = get(iova, size, PAGE, 16, bits);

	say("%s = %s, %#llx %#llx%s", what, outcome(result), (unsigned long long)bits[0],
	    (unsigned long long)bits[1], bits[2] == 0x5555 ? "" : ", and beyond");
}

static void section_dirty_bits(void)
{
	begin(TYPE1v2);
	need(!map(BUS, 4 * PAGE) && !map(BUS + 6 * PAGE, 10 * PAGE) && !map(BUS + 16 * PAGE, PAGE),
	     "MAP_DMA");
	dma_write(BUS);
	need(!track(START), "START");
	say_dirty("written before", BUS, 64 * PAGE, 0);
	dma_write(BUS + 3 * PAGE);
	dma_write(BUS + 8 * PAGE - 32);
	dma_text(dev, BUS + 9 * PAGE);
	need(!track(START), "START");
	say_dirty("one inside a page, one over its end", BUS, 64 * PAGE, 0);
	say_dirty("told already", BUS, 64 * PAGE, 0);
	dma_write(BUS + 6 * PAGE);
	dma_write(BUS + 16 * PAGE);
	say_dirty("bits of what is mapped are cleared, others stay", BUS, 128 * PAGE, -1ull);
	dma_write(BUS + 6 * PAGE);
	dma_write(BUS + 16 * PAGE);
	say_dirty("bits count from the iova", BUS + 6 * PAGE, 10 * PAGE, 0);
	say_dirty("outside of it nothing was cleared", BUS, 64 * PAGE, 0);
	dma_write(BUS + 6 * PAGE);
	say_dirty("from before what is mapped", BUS - 60 * PAGE, 128 * PAGE, 0);
	dma_write(BUS);
	say("a report that fails = %s", outcome(get(BUS, 4 * PAGE, PAGE, 8, nowhere)));
	say_dirty("forgets nothing", BUS, 4 * PAGE, 0);
	dma_write(BUS);
	need(unmap(0, BUS, 4 * PAGE) == 4 * PAGE && !map(BUS, 4 * PAGE), "UNMAP and MAP");
	say_dirty("what was unmapped is forgotten", BUS, 4 * PAGE, 0);
	dma_write(BUS);
	need(!track(STOP_TRACKING) && !track(START), "STOP and START");
	say_dirty("and so is everything by STOP", BUS, 64 * PAGE, 0);
	end();
}

static void say_bitmap(const char *what, struct dma_unmap argument, uint64_t *bits)
{
	long result = ioctl(container, TYPE1_UNMAP_DMA, &argument);

	say("%s = %s, size %#llx, bits %#llx", what, outcome(result),
	    (unsigned long long)argument.size, (unsigned long long)*bits);
}

static void section_unmap_bitmap(void)
{
	uint64_t bits[2] = { 0 };
	struct bitmap bitmap = { PAGE, 8, (uintptr_t)bits };
	struct dma_unmap argument = { 48, UNMAP_BITMAP, BUS, 4 * PAGE, bitmap };

	begin(TYPE1v2);
	need(!map(BUS, 4 * PAGE) && !map(BUS + 6 * PAGE, 2 * PAGE), "MAP_DMA");
	say_bitmap("not tracked", argument, bits);
	need(!track(START), "START");
	dma_write(BUS + PAGE);
	dma_write(BUS + 7 * PAGE);
	argument.argsz = 47;
	say_bitmap("argsz 47", argument, bits);
	argument.argsz = 48;
	say("cut at 40 bytes = %s",
	    outcome(ioctl(container, TYPE1_UNMAP_DMA, at_edge(&argument, 48, 40))));
	argument.flags = UNMAP_BITMAP | UNMAP_ALL;
	say_bitmap("and all", argument, bits);
	argument.flags = UNMAP_BITMAP | UNMAP_VADDR;
	say_bitmap("and addresses", argument, bits);
	argument.flags = UNMAP_BITMAP;
	argument.bitmap.pgsize = 8192;
	say_bitmap("pgsize 8192", argument, bits);
	argument.bitmap.pgsize = 0;
	say_bitmap("pgsize 0", argument, bits);
	argument.bitmap = (struct bitmap){ PAGE, 7, (uintptr_t)bits };
	say_bitmap("too little room", argument, bits);
	argument.bitmap = (struct bitmap){ PAGE, 8, -4096ull };
	say_bitmap("to an address of the kernel", argument, bits);
	argument.bitmap = (struct bitmap){ PAGE, 8, 4096 };
	say_bitmap("to memory that is not there", argument, bits);
	argument.bitmap = bitmap;
	argument.size = 2 * PAGE;
	say_bitmap("half of a mapping", argument, bits);
	say("DMA = %s", failed(dma_write(BUS + PAGE)));
	argument.size = 8 * PAGE;
	bits[0] = -1ull;
	say_bitmap("both", argument, bits);
	say("DMA = %s", failed(dma_write(BUS + PAGE)));
	bits[0] = -1ull;
	say_bitmap("nothing", argument, bits);
	need(!map(BUS, PAGE) && !map_dma(container, READ_WRITE, memory, BUS + 64 * PAGE, PAGE), "MAP_DMA");
	argument.size = 65 * PAGE;
	argument.bitmap = (struct bitmap){ PAGE, 16, (uintptr_t)at_edge(bits, 8, 8) };
	say_bitmap("two, and memory for the first", argument, bits);
	say_unmap("the first", 24, 0, BUS, PAGE);
	say_unmap("the second", 24, 0, BUS + 64 * PAGE, PAGE);
	end();
}

static void section_every_trackers_own(void)
{
	struct { uint64_t iova, length; } range = { BUS + PAGE, 4 * PAGE };
	struct { uint32_t argsz, flags; uint64_t page_size; uint32_t num, r; uint64_t ranges; } start = {
		32, SET | DMA_LOGGING_START, PAGE, 1, 0, (uintptr_t)&range,
	};
	uint64_t bits = 0;
	struct { uint32_t argsz, flags; uint64_t iova, length, page_size, bitmap; } report = {
		40, GET | DMA_LOGGING_REPORT, BUS, PAGES * PAGE, PAGE, (uintptr_t)&bits,
	};

	begin(TYPE1v2);
	need(!map(BUS, PAGES * PAGE) && !track(START), "MAP_DMA and START");
	need(!ioctl(dev, DEVICE_FEATURE, &start), "START of the device");
	dma_write(BUS + PAGE - 32);
	dma_write(BUS + 5 * PAGE - 32);
	say_dirty("the container", BUS, PAGES * PAGE, 0);
	need(!ioctl(dev, DEVICE_FEATURE, &report), "REPORT");
	say("the device: %#llx", (unsigned long long)bits);
	bits = 0;
	dma_write(BUS + 2 * PAGE);
	need(!ioctl(dev, DEVICE_FEATURE, &report), "REPORT");
	say("the device: %#llx", (unsigned long long)bits);
	say_dirty("the container", BUS, PAGES * PAGE, 0);
	end();
}

static void say_access(const char *what, char *at)
{
	need(!map_dma(container, READ_WRITE, at, BUS, 4 * PAGE), "MAP_DMA");
	memcpy(at + PAGE - 8, "read by a device", 16);
	say("%s: DMA read = %s", what, dma_text(dev, BUS + PAGE - 8));
	say("%s: DMA write = %s", what, failed(dma_write(BUS + 2 * PAGE - 32)));
	say("%s: it is there: %s", what, written(at + 2 * PAGE - 32));
	say("%s: DMA over the end = %s", what, failed(dma_write(BUS + 4 * PAGE - 32)));
	need(unmap(0, BUS, 4 * PAGE) == 4 * PAGE, "UNMAP_DMA");
	say("%s: DMA after UNMAP = %s", what, failed(dma_write(BUS)));
}

static void section_memory(void)
{
	int fd;

	begin(TYPE1v2);
	for (int sealed = 0; sealed < 2; sealed++) {
		fd = new_memfd(16 * PAGE, sealed);
		say_access(sealed ? "a sealed memfd" : "a memfd", shared(fd, 4 * PAGE, 8 * PAGE));
		close(fd);
	}
	say_access("anonymous memory", memory);
	end();
}

static const struct section sections[] = {
	{ "GET_INFO", section_info },
	{ "MAP_DMA", section_map },
	{ "UNMAP_DMA", section_unmap },
	{ "version 1", section_version_1 },
	{ "new addresses", section_new_address },
	{ "DIRTY_PAGES: arguments", section_dirty_arguments },
	{ "DIRTY_PAGES: bits", section_dirty_bits },
	{ "UNMAP_DMA with a bitmap", section_unmap_bitmap },
	{ "the container's log and the device's", section_every_trackers_own },
	{ "memory", section_memory },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	return run_sections(sections, argc, argv);
}
