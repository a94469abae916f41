/*
 * Groups and containers: how a program of the time before the character device and iommufd finds
 * its device, and what it is refused. Devices: vfio0, commanded; vfio1, any other.
 */
#include "group.h"

static void say_kind(const char *path)
{
	struct stat status;
	long result = stat(path, &status);

	say("stat %s = %s%s", path, outcome(result),
	    result ? "" : S_ISCHR(status.st_mode) ? ", a character device" : ", something else");
}

static const char *given(long fd)
{
	return fd < 0 ? outcome(fd) : fd_text(fd);
}

static void section_open(void)
{
	int group, other_group;
	int container = open("/dev/vfio/vfio", O_RDWR), other = open_container();

	say_kind("/dev/vfio/vfio");
	say_kind("/dev/vfio/0");
	say_kind("/dev/vfio/1");
	say_kind("/dev/vfio/2");
	say("open the container = %s", given(container));
	say("open it again, O_CLOEXEC = %s", given(other));
	group = open("/dev/vfio/0", O_RDWR);
	say("open group 0 = %s", given(group));
	say("again = %s", given(try_group(0)));
	say("group 1 = %s", given(other_group = try_group(1)));
	say("group 2 = %s", given(try_group(2)));
	say("group 00 = %s", given(open("/dev/vfio/00", O_RDWR)));
	say("group 0/x = %s", given(open("/dev/vfio/0/x", O_RDWR)));
	close(other_group);
	close(group);
	say("group 0 after its close = %s", given(group = open("/dev/vfio/0", O_RDONLY | O_CLOEXEC)));
	close(dup(group));
	say("again, after a copy was closed = %s", given(try_group(0)));
	close(group);
	exhaust_descriptors();
	say("with a full table, the container = %s", given(open("/dev/vfio/vfio", O_RDWR)));
	say("with a full table, the group = %s", given(try_group(0)));
	restore_descriptors();
	say("then = %s", given(group = try_group(0)));
	close(group);
	close(container);
	close(other);
}

static void say_extensions(int container)
{
	static const unsigned long asked[] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0x100000003ul };

	for (size_t at = 0; at < sizeof(asked) / sizeof(*asked); at++)
		say("CHECK_EXTENSION %#lx = %s", asked[at],
		    outcome(ioctl(container, CHECK_EXTENSION, asked[at])));
}

static void section_alone(void)
{
	int container = open_container();

	say("GET_API_VERSION = %s", outcome(ioctl(container, GET_API_VERSION)));
	say_extensions(container);
	say("SET_IOMMU = %s", outcome(ioctl(container, SET_IOMMU, TYPE1v2)));
	say("GET_INFO = %s", outcome(ioctl(container, TYPE1_GET_INFO, NULL)));
	say("MAP_DMA = %s", outcome(ioctl(container, TYPE1_MAP_DMA, NULL)));
	say("UNMAP_DMA = %s", outcome(ioctl(container, TYPE1_UNMAP_DMA, NULL)));
	say("DIRTY_PAGES = %s", outcome(ioctl(container, TYPE1_DIRTY_PAGES, NULL)));
	say("a request of groups = %s", outcome(ioctl(container, GROUP_GET_STATUS, NULL)));
	say("unknown request = %s", outcome(ioctl(container, UNKNOWN_REQUEST, NULL)));
	close(container);
}

static void say_status(const char *what, int group)
{
	struct group_status status = { 8, 0xFF };
	long result = ioctl(group, GROUP_GET_STATUS, &status);

	say("%s = %s, argsz %u flags %u", what, outcome(result), status.argsz, status.flags);
}

static void section_status(void)
{
	int group = open_group(0), container = open_container();
	struct group_status status = { 7, 0 };

	say("argsz 7 = %s", outcome(ioctl(group, GROUP_GET_STATUS, &status)));
	status.argsz = 64;
	say("argsz 64 = %s, argsz %u", outcome(ioctl(group, GROUP_GET_STATUS, &status)), status.argsz);
	say("nowhere = %s", outcome(ioctl(group, GROUP_GET_STATUS, nowhere)));
	say("cut at 4 bytes = %s", outcome(ioctl(group, GROUP_GET_STATUS, at_edge(&status, 8, 4))));
	say("read-only memory = %s", outcome(ioctl(group, GROUP_GET_STATUS, read_only(&status, 8))));
	say_status("alone", group);
	need(!set_container(group, container), "SET_CONTAINER");
	say_status("in a container", group);
	need(!ioctl(group, GROUP_UNSET_CONTAINER), "UNSET_CONTAINER");
	say_status("alone again", group);
	say("a request of containers = %s", outcome(ioctl(group, GET_API_VERSION)));
	say("a request of devices = %s", outcome(ioctl(group, DEVICE_RESET)));
	say("unknown request = %s", outcome(ioctl(group, UNKNOWN_REQUEST)));
	close(group);
	close(container);
}

static void section_set_container(void)
{
	int group = open_group(0), other = open_group(1), container = open_container();
	int dev = open_device(0), file = open("/proc/self/exe", O_RDONLY);

	say("UNSET before = %s", outcome(ioctl(group, GROUP_UNSET_CONTAINER)));
	say("nowhere = %s", outcome(ioctl(group, GROUP_SET_CONTAINER, nowhere)));
	say("a number that is not open = %s", outcome(set_container(group, 900)));
	say("-1 = %s", outcome(set_container(group, -1)));
	say("a file = %s", outcome(set_container(group, file)));
	say("the group = %s", outcome(set_container(group, group)));
	say("a device = %s", outcome(set_container(group, dev)));
	say("a container = %s", outcome(set_container(group, container)));
	say("again = %s", outcome(set_container(group, container)));
	say("again, nowhere = %s", outcome(ioctl(group, GROUP_SET_CONTAINER, nowhere)));
	say("again, a number that is not open = %s", outcome(set_container(group, 900)));
	say("again, a file = %s", outcome(set_container(group, file)));
	say("another group = %s", outcome(set_container(other, container)));
	say("UNSET = %s", outcome(ioctl(group, GROUP_UNSET_CONTAINER)));
	say("UNSET again = %s", outcome(ioctl(group, GROUP_UNSET_CONTAINER)));
	say("SET once more = %s", outcome(set_container(group, container)));
	close(file);
	close(dev);
	close(group);
	close(other);
	close(container);
}

static void section_set_iommu(void)
{
	static const unsigned long refused[] = { 0, 2, 4, 6, 7, 8, 9, 10, 11, 0x100000003ul };
	int container = open_container(), group = open_in(container, 0, 0);

	for (size_t at = 0; at < sizeof(refused) / sizeof(*refused); at++)
		say("SET_IOMMU %#lx = %s", refused[at],
		    outcome(ioctl(container, SET_IOMMU, refused[at])));
	say("MAP_DMA = %s", outcome(ioctl(container, TYPE1_MAP_DMA, NULL)));
	say("SET_IOMMU 3 = %s", outcome(ioctl(container, SET_IOMMU, TYPE1v2)));
	say("SET_IOMMU 3 again = %s", outcome(ioctl(container, SET_IOMMU, TYPE1v2)));
	say("SET_IOMMU 0 = %s", outcome(ioctl(container, SET_IOMMU, 0ul)));
	say("GET_API_VERSION = %s", outcome(ioctl(container, GET_API_VERSION)));
	say_extensions(container);
	say("MAP_DMA = %s", outcome(ioctl(container, TYPE1_MAP_DMA, NULL)));
	say("a request of groups = %s", outcome(ioctl(container, GROUP_GET_STATUS, NULL)));
	say("unknown request = %s", outcome(ioctl(container, UNKNOWN_REQUEST, NULL)));
	close(group);
	say("MAP_DMA without a group = %s", outcome(ioctl(container, TYPE1_MAP_DMA, NULL)));
	say("SET_IOMMU without a group = %s", outcome(ioctl(container, SET_IOMMU, TYPE1v2)));
	group = open_in(container, 0, TYPE1);
	say("version 1: SET_IOMMU 3 = %s", outcome(ioctl(container, SET_IOMMU, TYPE1v2)));
	close(group);
	close(container);
}

static void say_device(const char *what, int group, const char *name)
{
	long fd = device_fd(group, name);

	say("%s = %s", what, given(fd));
	if (fd >= 0)
		close(fd);
}

static void section_names(void)
{
	int container = open_container(), group = open_in(container, 0, TYPE1v2);
	char *name = malloc(5000);

	say_device("nowhere", group, nowhere);
	say_device("cut off before its end", group, at_edge(NAME_0, sizeof(NAME_0), 8));
	say_device("at the end of memory", group, at_edge(NAME_0, sizeof(NAME_0), sizeof(NAME_0)));
	memset(name, 'x', 5000);
	say_device("5000 bytes", group, name);
	name[4096] = 0;
	say_device("4096 bytes and a zero", group, name);
	name[4095] = 0;
	say_device("4095 bytes and a zero", group, name);
	say_device("empty", group, "");
	say_device("vfio0", group, "vfio0");
	say_device("the other group's device", group, NAME_1);
	say_device("the first half", group, "0000:01");
	say_device("more behind it", group, NAME_0 "0");
	say_device("a space behind it", group, NAME_0 " ");
	say_device("an option", group, NAME_0 " vf_token=bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3");
	say_device("an unknown option", group, NAME_0 " x");
	say_device("its name", group, NAME_0);
	free(name);
	close(group);
	close(container);
}

static void section_device_fd(void)
{
	int container = open_container(), group = open_group(0), dev, other;
	char path[64];

	say_device("no container", group, NAME_0);
	say_device("no container, and an unknown name", group, "x");
	need(!set_container(group, container), "SET_CONTAINER");
	say_device("no IOMMU", group, NAME_0);
	need(!ioctl(container, SET_IOMMU, TYPE1v2), "SET_IOMMU");
	exhaust_descriptors();
	say_device("a full table", group, NAME_0);
	say_device("a full table, and an unknown name", group, "x");
	restore_descriptors();
	dev = device_fd(group, NAME_0);
	say("it = %s, access mode %s", given(dev),
	    (fcntl(dev, F_GETFL) & O_ACCMODE) == O_RDWR ? "O_RDWR" : "another");
	say("UNSET_CONTAINER = %s", outcome(ioctl(group, GROUP_UNSET_CONTAINER)));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", dev);
	say("open it anew = %s", given(open(path, O_RDWR)));
	other = device_fd(group, NAME_0);
	say("a second one = %s", given(other));
	close(dev);
	say("UNSET_CONTAINER = %s", outcome(ioctl(group, GROUP_UNSET_CONTAINER)));
	close(other);
	say("UNSET_CONTAINER after both = %s", outcome(ioctl(group, GROUP_UNSET_CONTAINER)));
	say_device("no container", group, NAME_0);
	close(group);
	close(container);
}

static void section_device(void)
{
	int container = open_container(), group = open_in(container, 0, TYPE1v2);
	int dev = device_fd(group, NAME_0), iommufd = open_iommu();
	struct bind bind = { .argsz = 15, .iommufd = iommufd };
	struct attach attach = { .argsz = 12, .pt_id = 1 };
	char data[16];

	say("PROBE MIGRATION = %s", outcome(feature(dev, PROBE | MIGRATION, 8)));
	say("pread of BAR0 = %s", outcome(pread(dev, data, 16, bar0_offset(dev))));
	say("BIND argsz 15 = %s", outcome(ioctl(dev, DEVICE_BIND_IOMMUFD, &bind)));
	say("BIND nowhere = %s", outcome(ioctl(dev, DEVICE_BIND_IOMMUFD, nowhere)));
	say("BIND = %s", outcome(bind_to(dev, iommufd)));
	say("BIND to a number that is not open = %s", outcome(bind_to(dev, 900)));
	say("ATTACH = %s", outcome(ioctl(dev, DEVICE_ATTACH_IOMMUFD_PT, &attach)));
	say("ATTACH nowhere = %s", outcome(ioctl(dev, DEVICE_ATTACH_IOMMUFD_PT, nowhere)));
	say("DETACH = %s", outcome(ioctl(dev, DEVICE_DETACH_IOMMUFD_PT, &attach)));
	say("a request of groups = %s", outcome(ioctl(dev, GROUP_GET_STATUS, NULL)));
	say("RESET = %s", outcome(ioctl(dev, DEVICE_RESET)));
	close(dev);
	close(iommufd);
	close(group);
	close(container);
}

/* SET, and say what came back; return the data_fd. */
static int say_set(const char *what, int dev, uint32_t state)
{
	struct mig_state argument = { 16, SET | MIG_DEVICE_STATE, state, UNTOUCHED };
	long result = ioctl(dev, DEVICE_FEATURE, &argument);

	say("%s: SET %s = %s, %s", what, state_name(state), outcome(result),
	    fd_text(argument.data_fd));
	return argument.data_fd;
}

static const char *state_of(int dev)
{
	struct mig_state argument = { .argsz = 16, .flags = GET | MIG_DEVICE_STATE };

	need(!ioctl(dev, DEVICE_FEATURE, &argument), "GET");
	return state_name(argument.device_state);
}

static void section_migration(void)
{
	int container = open_container(), group = open_in(container, 0, TYPE1v2);
	int one = device_fd(group, NAME_0), other = device_fd(group, NAME_0), stream;
	static char state[10000];

	stream = say_set("one", one, STOP_COPY);
	say("the other is in %s", state_of(other));
	say_set("the other", other, STOP_COPY);
	say("read = %s", outcome(read(stream, state, 100)));
	close(one);
	say("read after one was closed = %s", outcome(read(stream, state, sizeof(state))));
	say("the other is in %s", state_of(other));
	close(other);
	say("read after both were closed = %s", outcome(read(stream, state, 1)));
	close(stream);
	one = device_fd(group, NAME_0);
	say("a new one is in %s", state_of(one));
	stream = say_set("the new one", one, RESUMING);
	close(group);
	close(container);
	say("write after the group was closed = %s", outcome(write(stream, state, 10)));
	close(one);
	say("write after all was closed = %s", outcome(write(stream, state, 10)));
	close(stream);
}

static void section_who_keeps_what(void)
{
	int container = open_container(), group = open_in(container, 0, TYPE1v2);
	int dev = device_fd(group, NAME_0);
	char *memory = anonymous(PAGE);

	enable_dma(dev);
	need(!map_dma(container, MAP_READ | MAP_WRITE, memory, BUS, PAGE), "MAP_DMA");
	close(container);
	say("DMA when the container was closed = %s", failed(dma(dev, 0x18, BUS)));
	close(group);
	say("DMA when the group was closed = %s", failed(dma(dev, 0x18, BUS)));
	say("open the group = %s", given(try_group(0)));
	close(dev);
	say("after the device was closed = %s", given(group = try_group(0)));
	say("UNSET_CONTAINER = %s", outcome(ioctl(group, GROUP_UNSET_CONTAINER)));
	close(group);

	container = open_container();
	group = open_in(container, 0, TYPE1v2);
	dev = device_fd(group, NAME_0);
	need(!map_dma(container, MAP_READ | MAP_WRITE, memory, BUS, PAGE), "MAP_DMA");
	close(dev);
	close(group);
	say("MAP_DMA when the group has left = %s",
	    outcome(map_dma(container, MAP_READ, memory, BUS, PAGE)));
	group = open_in(container, 0, TYPE1v2);
	dev = device_fd(group, NAME_0);
	enable_dma(dev);
	say("DMA when it came back = %s", failed(dma(dev, 0x18, BUS)));
	say("MAP_DMA = %s", outcome(map_dma(container, MAP_READ | MAP_WRITE, memory, BUS, PAGE)));
	say("DMA = %s", failed(dma(dev, 0x18, BUS)));
	close(dev);
	close(group);
	close(container);
}

static void section_two_groups(void)
{
	int container = open_container(), group = open_in(container, 0, TYPE1v2), other, dev;
	char *memory = anonymous(PAGE);

	need(!map_dma(container, MAP_READ | MAP_WRITE, memory, BUS, PAGE), "MAP_DMA");
	say("another group = %s", outcome(set_container(other = open_group(1), container)));
	say_device("its device by the first", group, NAME_1);
	say_device("its device", other, NAME_1);
	close(group);
	group = open_in(container, 0, 0);
	dev = device_fd(group, NAME_0);
	enable_dma(dev);
	say("DMA of one that left and came back = %s", failed(dma(dev, 0x18, BUS)));
	say("it is there: %s", written(memory));
	close(dev);
	close(group);
	close(other);
	say("UNMAP_DMA when both have left = %s", outcome(unmap_dma(container, 0, BUS, PAGE)));
	close(container);
}

static void section_both_ways(void)
{
	int dev = open_bound(0), group, iommufd = open_iommu(), other;

	say("the group of a device that is bound = %s", given(try_group(0)));
	say("the group of another one = %s", given(group = try_group(1)));
	close(group);
	close(dev);
	dev = open_device(0);
	say("the group of a device that is open = %s", given(group = try_group(0)));
	say("BIND = %s", outcome(bind_to(dev, iommufd)));
	say("BIND to a number that is not open = %s", outcome(bind_to(dev, 900)));
	say("BIND to -1 = %s", outcome(bind_to(dev, -1)));
	other = open("/dev/vfio/devices/vfio0", O_RDWR);
	say("another open = %s", given(other));
	close(other);
	close(group);
	say("BIND when the group was closed = %s", outcome(bind_to(dev, iommufd)));
	say("the group = %s", given(try_group(0)));
	close(dev);
	say("the group when the device was closed = %s", given(group = try_group(0)));
	close(group);
	close(iommufd);
}

static void section_no_stream(void)
{
	int fds[2] = { open_container(), open_group(0) };
	static const char *const names[] = { "container", "group" };
	char data[16];

	for (int at = 0; at < 2; at++) {
		int fd = fds[at];

		say("%s: read = %s", names[at], outcome(read(fd, data, 1)));
		say("%s: write = %s", names[at], outcome(write(fd, "x", 1)));
		say("%s: pread = %s", names[at], outcome(pread(fd, data, 1, 0)));
		say("%s: pwrite = %s", names[at], outcome(pwrite(fd, "x", 1, 0)));
		say("%s: lseek = %s", names[at], outcome(lseek(fd, 0, SEEK_SET)));
		say("%s: mmap = %s", names[at],
		    mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED ? outcome(-1) : "0");
		say("%s: ftruncate = %s", names[at], outcome(ftruncate(fd, 0)));
		close(fd);
	}
}

static const struct section sections[] = {
	{ "open", section_open },
	{ "a container alone", section_alone },
	{ "GET_STATUS", section_status },
	{ "SET_CONTAINER", section_set_container },
	{ "SET_IOMMU", section_set_iommu },
	{ "GET_DEVICE_FD: names", section_names },
	{ "GET_DEVICE_FD", section_device_fd },
	{ "a device by its group", section_device },
	{ "one state for all descriptors", section_migration },
	{ "who keeps what", section_who_keeps_what },
	{ "two groups", section_two_groups },
	{ "both ways", section_both_ways },
	{ "no stream", section_no_stream },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	return run_sections(sections, argc, argv);
}
