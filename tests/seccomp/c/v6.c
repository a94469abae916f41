/*
 * The dialect of the patch "vfio: Define device migration protocol v2".
 */
#include "states.h"

static int open_for_use(int number)
{
	return open_device(number);
}

static struct reply request(int dev, uint32_t target, bool in_read_only_memory)
{
	struct v6_state argument = { 16, target, UNTOUCHED, 0 };
	void *where = in_read_only_memory ? read_only(&argument, 16) : &argument;
	long result = ioctl(dev, DEVICE_MIG_SET_STATE, where);

	return (struct reply){ result, argument.device_state, argument.data_fd };
}

/* V6 has no query; a request for ERROR is refused, does nothing, and tells the state. */
static uint32_t state_of(int dev)
{
	struct reply reply = request(dev, ERROR, false);

	need(reply.result < 0 && errno == EINVAL, "a refusal of ERROR");
	return reply.device_state;
}

static void say_state(int dev)
{
	say("the state is %s", state_name(state_of(dev)));
}

static void section_opening(void)
{
	int dev = open_device(SOURCE), other, iommufd;

	say("without BIND:");
	say("PROBE MIGRATION = %s", outcome(feature(dev, PROBE | MIGRATION, 8)));
	say_state(dev);
	say_set(dev, STOP);
	other = open_device(SOURCE);
	say("another open of the same device:");
	say_state(other);
	close(dev);
	say("the first one closed:");
	say_state(other);
	close(other);
	dev = open_device(SOURCE);
	say("closed and opened again:");
	say_state(dev);
	iommufd = open_iommu();
	say("BIND = %s", outcome(bind_to(dev, iommufd)));
	say("BIND again = %s", outcome(bind_to(dev, iommufd)));
	say("STOP = %s", outcome(request(dev, STOP, false).result));
	close(iommufd);
	say_state(dev);
	close(dev);
}

static void section_features(void)
{
	static const int devices[] = { SOURCE, UNABLE };

	for (int at = 0; at < 2; at++) {
		int dev = open_device(devices[at]);

		say(at ? "a device that cannot migrate:" : "a device that could do everything:");
		probe_all(dev, 14);
		close(dev);
	}
}

static void section_migration_feature(void)
{
	int dev = open_device(SOURCE), unable = open_device(UNABLE);
	struct feature argument = { .argsz = 16, .flags = GET | MIGRATION };

	say_feature_migration(dev, GET, 7);
	say_feature_migration(dev, GET, 8);
	say_feature_migration(dev, GET, 15);
	say_feature_migration(dev, GET, 16);
	say_feature_migration(dev, GET, 24);
	say_feature_migration(dev, SET, 16);
	say_feature_migration(dev, GET | SET, 16);
	say_feature_migration(dev, 0, 16);
	say_feature_migration(dev, GET | 0x80000, 16);
	say_feature_migration(unable, GET, 16);
	say("no memory = %s", outcome(ioctl(dev, DEVICE_FEATURE, NULL)));
	say("cut at 4 bytes = %s", outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 8, 4))));
	say("payload cut off = %s", outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 16, 8))));
	say("read-only memory = %s", outcome(ioctl(dev, DEVICE_FEATURE, read_only(&argument, 16))));
	say("unknown index, GET = %s", outcome(feature(dev, GET | 0xFFFF, 16)));
	close(unable);
	close(dev);
}

static void section_set_refused(void)
{
	static const uint32_t wrong[] = { ERROR, 5, 6, 7, 8, 9, 255, 0x7FFFFFFF, UINT32_MAX };
	int dev = open_device(SOURCE), fd;
	char byte;

	for (int at = 0; at < 9; at++)
		say_set(dev, wrong[at]);
	fd = say_set(dev, STOP_COPY);
	for (int at = 0; at < 9; at++)
		say_set(dev, wrong[at]);
	say("read of the session = %s", outcome(read(fd, &byte, 1)));
	close(fd);
	close(dev);
}

static void say_arguments(int dev, uint32_t argsz, uint32_t flags)
{
	struct { struct v6_state state; uint64_t beyond; } argument = {
		{ argsz, STOP, 12345, flags }, 0x2222,
	};
	long result = ioctl(dev, DEVICE_MIG_SET_STATE, &argument);

	say("argsz %u flags %#x = %s, argsz %u device_state %s data_fd %d flags %#x, then %#llx",
	    argsz, flags, outcome(result), argument.state.argsz,
	    state_name(argument.state.device_state), argument.state.data_fd, argument.state.flags,
	    (unsigned long long)argument.beyond);
}

static void section_set_arguments(void)
{
	int dev = open_device(SOURCE), unable = open_device(UNABLE);
	struct v6_state argument = { 16, STOP, UNTOUCHED, 0 };

	say_arguments(dev, 0, 0);
	say_arguments(dev, 15, 0);
	say_arguments(dev, 16, 1);
	say_arguments(dev, 16, 0x80000000);
	say("no memory = %s", outcome(ioctl(dev, DEVICE_MIG_SET_STATE, NULL)));
	say("cut at 12 bytes = %s",
	    outcome(ioctl(dev, DEVICE_MIG_SET_STATE, at_edge(&argument, 16, 12))));
	say_state(dev);
	say_arguments(dev, 24, 0);
	say_arguments(dev, 16, 0);
	say("a device that cannot migrate:");
	say_arguments(unable, 16, 0);
	say("no memory = %s", outcome(ioctl(unable, DEVICE_MIG_SET_STATE, NULL)));
	close(unable);
	close(dev);
}

static void section_set_full_table(void)
{
	int dev = open_device(SOURCE), fd;
	char byte;

	exhaust_descriptors();
	say_set(dev, STOP_COPY);
	say_state(dev);
	say_set(dev, STOP);
	say_set(dev, RESUMING);
	say_state(dev);
	restore_descriptors();
	say_set(dev, RESUMING);
	say_reset(dev);
	fd = say_set(dev, STOP_COPY);
	say("read = %s", outcome(read(fd, &byte, 1)));
	close(fd);
	close(dev);
}

static void section_failing_arcs(void)
{
	static const int numbers[] = { EOPNOTSUPP, ENOTTY, EFAULT, EIO, EBUSY, ENODEV, EMFILE };
	int dev = open_device(COMMANDED), fd;
	struct v6_state argument = { 16, STOP_COPY, UNTOUCHED, 0 };
	char byte;

	for (int at = 0; at < 7; at++) {
		fail_arc(dev, RUNNING, STOP, numbers[at], STAYS);
		say("the device says %s:", strerrorname_np(numbers[at]));
		say_set(dev, STOP);
	}
	say("half way:");
	fail_arc(dev, STOP, STOP_COPY, ENOSPC, STAYS);
	say_set(dev, STOP_COPY);
	say("SET STOP_COPY in read-only memory = %s",
	    outcome(ioctl(dev, DEVICE_MIG_SET_STATE, read_only(&argument, 16))));
	say_state(dev);
	clear_commands(dev);
	fd = go(dev, STOP_COPY);
	fail_arc(dev, STOP, RUNNING, EAGAIN, STAYS);
	say_set(dev, RUNNING);
	say("read = %s", outcome(read(fd, &byte, 1)));
	close(fd);
	close(dev);
}

/* Such a device answers a request for ERROR as it likes: nothing tells where it is. */
static void section_whole(void)
{
	int dev = open_device(WHOLE), fd;
	char bytes[8] = "";
	ssize_t count;

	fd = say_set(dev, STOP_COPY);
	count = read(fd, bytes, sizeof(bytes));
	say("read = %s, %.5s", outcome(count), bytes);
	say("a state that is left unset:");
	say_set(dev, STOP);
	say("read = %s", outcome(read(fd, bytes, 1)));
	close(fd);
	say_reset(dev);
	say("a session before the state is reached:");
	say_set(dev, RESUMING);
	say_set(dev, RUNNING);
	close(dev);
}

static void section_reset_and_close(void)
{
	char byte = 0;

	for (uint32_t state = 1; state < 5; state++) {
		int dev = open_device(COMMANDED), fd = go(dev, state);

		say("from %s:", state_name(state));
		say_reset(dev);
		say_state(dev);
		if (fd >= 0) {
			say("read after the reset = %s", outcome(read(fd, &byte, 1)));
			say("write after the reset = %s", outcome(write(fd, &byte, 1)));
			close(fd);
		}
		fd = go(dev, state);
		close(dev);
		if (fd >= 0) {
			say("read after the last close = %s", outcome(read(fd, &byte, 1)));
			say("write after the last close = %s", outcome(write(fd, &byte, 1)));
			close(fd);
		}
		dev = open_device(COMMANDED);
		say("opened again:");
		say_state(dev);
		close(dev);
	}
}

static void section_descriptors(void)
{
	int dev = open_device(COMMANDED), fd = go(dev, STOP_COPY);
	struct precopy_info info = { .argsz = sizeof(info) };
	struct iovec part = { &info, 4 };

	say("saving: write = %s, pread = %s, lseek = %s", outcome(write(fd, &info, 1)),
	    outcome(pread(fd, &info, 1, 0)), outcome(lseek(fd, 0, SEEK_CUR)));
	say("saving: readv = %s", outcome(readv(fd, &part, 1)));
	say("saving: 0x3B79 = %s", outcome(ioctl(fd, MIG_GET_PRECOPY_INFO, &info)));
	say("saving: FEATURE = %s", outcome(ioctl(fd, DEVICE_FEATURE, &info)));
	say("saving: unknown = %s", outcome(ioctl(fd, UNKNOWN_REQUEST, &info)));
	close(fd);
	go(dev, STOP);
	fd = go(dev, RESUMING);
	say("resuming: read = %s, pwrite = %s, lseek = %s", outcome(read(fd, &info, 1)),
	    outcome(pwrite(fd, &info, 1, 0)), outcome(lseek(fd, 0, SEEK_CUR)));
	say("resuming: writev = %s", outcome(writev(fd, &part, 1)));
	say("resuming: 0x3B79 = %s", outcome(ioctl(fd, MIG_GET_PRECOPY_INFO, &info)));
	close(fd);
	say("device: unknown = %s", outcome(ioctl(dev, UNKNOWN_REQUEST, &info)));
	close(dev);
}

static void section_verdict(void)
{
	static const char zeros[8192];
	int dev = open_device(COMMANDED), fd = go(dev, RESUMING);

	say("write = %s", outcome(write(fd, zeros, 5000)));
	say_set(dev, STOP);
	say("write = %s", outcome(write(fd, zeros, 1)));
	say_set(dev, RUNNING);
	say_reset(dev);
	close(fd);
	fd = go(dev, RESUMING);
	say("write = %s", outcome(write(fd, zeros, 8192)));
	say("one byte more = %s", outcome(write(fd, zeros, 1)));
	say_set(dev, RUNNING);
	close(fd);
	close(dev);
}

static void save_all(int dev, struct bytes *into)
{
	int fd = go(dev, STOP_COPY);

	read_all(fd, into, 10000);
	close(fd);
}

/* Every way that six arcs leave: to STOP first or not, and from RESUMING to each other state. */
static void section_migration(void)
{
	static const uint32_t ends[] = { STOP, RUNNING, STOP_COPY };

	for (int at = 0; at < 6; at++) {
		int source = open_device(SOURCE), destination = open_device(DESTINATION), fd;
		struct bytes stream = { 0 }, again = { 0 };
		uint32_t end = ends[at % 3];

		if (at >= 3)
			go(source, STOP);
		save_all(source, &stream);
		fd = go(destination, RESUMING);
		say("write = %s", outcome(write_all(fd, &stream, 7777)));
		close(fd);
		fd = say_set(destination, end);
		if (end == STOP_COPY) {
			read_all(fd, &again, 5000);
			close(fd);
		} else {
			save_all(destination, &again);
		}
		say("saved again: %s", same(&stream, &again));
		free(stream.data);
		free(again.data);
		close(source);
		close(destination);
	}
}

static const struct section sections[] = {
	{ "opening", section_opening },
	{ "FEATURE: every index", section_features },
	{ "MIGRATION", section_migration_feature },
	{ "SET", section_set },
	{ "SET: refused targets", section_set_refused },
	{ "SET: arguments", section_set_arguments },
	{ "SET: read-only memory", section_set_unwritable },
	{ "SET: no descriptor left", section_set_full_table },
	{ "arcs that fail", section_failing_arcs },
	{ "ERROR", section_error },
	{ "devices with whole control", section_whole },
	{ "RESET and last close", section_reset_and_close },
	{ "last close, again and again", section_close_at_once },
	{ "data_fds", section_descriptors },
	{ "the verdict", section_verdict },
	{ "migration", section_migration },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	return run_sections(sections, argc, argv);
}
