/*
 * The landed dialect: features, states, and everything that can go wrong with them.
 */
#include "landed.h"

#define UNKNOWN_FEATURE 0x0FFFu

/* ---- Features. ---- */

static void section_probe(void)
{
	static const int devices[] = { SOURCE, PLAIN, UNABLE };
	static const char *const names[] = {
		"a device with every capability", "a device without PRE_COPY",
		"a device that cannot migrate",
	};

	for (int at = 0; at < 3; at++) {
		int dev = open_bound(devices[at]);

		say("%s:", names[at]);
		probe_all(dev, 16);
		close(dev);
	}
}

static void section_feature_header(void)
{
	int dev = open_bound(SOURCE);
	struct feature argument = { .argsz = 16, .flags = GET | MIGRATION };

	say("no memory = %s", outcome(ioctl(dev, DEVICE_FEATURE, NULL)));
	say("cut at 4 bytes = %s", outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 8, 4))));
	say("argsz 0 = %s", outcome(feature(dev, PROBE | MIGRATION, 0)));
	say("argsz 7 = %s", outcome(feature(dev, PROBE | MIGRATION, 7)));
	say("argsz 7, unknown index = %s", outcome(feature(dev, PROBE | UNKNOWN_FEATURE, 7)));
	say("argsz of all ones = %s", outcome(feature(dev, PROBE | MIGRATION, UINT32_MAX)));
	say("flag 0x80000 = %s", outcome(feature(dev, PROBE | MIGRATION | 0x80000, 8)));
	say("flag 0x80000000 = %s", outcome(feature(dev, PROBE | MIGRATION | 0x80000000, 8)));
	say("flag 0x80000, unknown index = %s", outcome(feature(dev, UNKNOWN_FEATURE | 0x80000, 8)));
	say("GET and SET = %s", outcome(feature(dev, GET | SET | MIG_DEVICE_STATE, 16)));
	say("GET and SET, unknown index = %s", outcome(feature(dev, GET | SET | UNKNOWN_FEATURE, 16)));
	say("unknown index, no operation = %s", outcome(feature(dev, UNKNOWN_FEATURE, 8)));
	say("unknown index, PROBE = %s", outcome(feature(dev, PROBE | UNKNOWN_FEATURE, 8)));
	say("index of all ones, GET = %s", outcome(feature(dev, GET | 0xFFFF, 16)));
	say("no operation = %s", outcome(feature(dev, MIGRATION, 16)));
	say("PROBE and an operation, payload cut off = %s",
	    outcome(ioctl(dev, DEVICE_FEATURE,
			  at_edge(&(struct feature){ 8, PROBE | GET | MIGRATION, { 0 } }, 8, 8))));
	close(dev);
}

static void section_migration(void)
{
	int dev = open_bound(SOURCE), plain = open_bound(PLAIN), unable = open_bound(UNABLE);
	struct feature argument = { .argsz = 16, .flags = GET | MIGRATION };

	say_feature_migration(dev, GET, 8);
	say_feature_migration(dev, GET, 15);
	say_feature_migration(dev, GET, 16);
	say_feature_migration(dev, GET, 24);
	say_feature_migration(plain, GET, 16);
	say_feature_migration(unable, GET, 16);
	say("SET = %s", outcome(feature(dev, SET | MIGRATION, 16)));
	say("payload cut off = %s", outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 16, 8))));
	say("payload cut at 4 bytes = %s",
	    outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 16, 12))));
	say("read-only memory = %s", outcome(ioctl(dev, DEVICE_FEATURE, read_only(&argument, 16))));
	close(unable);
	close(plain);
	close(dev);
}

static void say_size(int dev, uint32_t argsz)
{
	struct feature argument = { .argsz = argsz, .flags = GET | MIG_DATA_SIZE };
	long result = ioctl(dev, DEVICE_FEATURE, &argument);

	say("DATA_SIZE in %s, argsz %u = %s, %llu bytes", state_name(state_of(dev)), argsz,
	    outcome(result), (unsigned long long)argument.payload[0]);
}

static void section_data_size(void)
{
	int dev = open_bound(COMMANDED), unable = open_bound(UNABLE), fd;
	struct feature argument = { .argsz = 16, .flags = GET | MIG_DATA_SIZE };

	say_size(dev, 15);
	for (uint32_t state = 1; state < 8; state++) {
		fd = go(dev, state);
		say_size(dev, 16);
		if (fd >= 0)
			close(fd);
		if (state == STOP_COPY)
			go(dev, STOP);	/* and no way back from RESUMING but a reset */
		if (state == RESUMING)
			ioctl(dev, DEVICE_RESET);
	}
	say("SET = %s", outcome(feature(dev, SET | MIG_DATA_SIZE, 16)));
	say("payload cut off = %s", outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 16, 8))));
	say("read-only memory = %s", outcome(ioctl(dev, DEVICE_FEATURE, read_only(&argument, 16))));
	say("a device that cannot migrate = %s", outcome(ioctl(unable, DEVICE_FEATURE, &argument)));
	close(unable);
	close(dev);
}

/* ---- States. ---- */

static void section_get(void)
{
	int dev = open_bound(SOURCE), unable = open_bound(UNABLE);
	struct mig_state argument = { .argsz = 16, .flags = GET | MIG_DEVICE_STATE };
	struct { struct mig_state state; uint64_t beyond; } larger = { argument, 0x2222 };

	say_state(dev);
	say("argsz 8 = %s", outcome(feature(dev, GET | MIG_DEVICE_STATE, 8)));
	say("argsz 15 = %s", outcome(feature(dev, GET | MIG_DEVICE_STATE, 15)));
	larger.state.argsz = 24;
	say("argsz 24 = %s", outcome(ioctl(dev, DEVICE_FEATURE, &larger)));
	say("and then argsz %u flags %#x, behind it %#llx", larger.state.argsz, larger.state.flags,
	    (unsigned long long)larger.beyond);
	say("no operation = %s", outcome(feature(dev, MIG_DEVICE_STATE, 16)));
	say("payload cut off = %s", outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 16, 8))));
	say("payload cut at 4 bytes = %s",
	    outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 16, 12))));
	say("read-only memory = %s", outcome(ioctl(dev, DEVICE_FEATURE, read_only(&argument, 16))));
	say("a device that cannot migrate = %s", outcome(ioctl(unable, DEVICE_FEATURE, &argument)));
	close(unable);
	close(dev);
}

static void section_set_refused(void)
{
	static const uint32_t wrong[] = { ERROR, 8, 9, 255, 0x7FFFFFFF, UINT32_MAX };
	int dev = open_bound(SOURCE), plain = open_bound(PLAIN), unable = open_bound(UNABLE), fd;
	char byte;

	for (int at = 0; at < 6; at++)
		say_set(dev, wrong[at]);
	say_state(dev);
	fd = say_set(dev, STOP_COPY);
	say("in STOP_COPY:");
	for (int at = 0; at < 6; at++)
		say_set(dev, wrong[at]);
	say_set(dev, PRE_COPY);
	say_set(dev, PRE_COPY_P2P);
	say_state(dev);
	say("read of the session = %s", outcome(read(fd, &byte, 1)));
	close(fd);
	say("a device with STOP_COPY alone:");
	say_set(plain, RUNNING_P2P);
	say_set(plain, PRE_COPY);
	say_set(plain, PRE_COPY_P2P);
	say_state(plain);
	say("a device that cannot migrate:");
	say_set(unable, STOP);
	close(unable);
	close(plain);
	close(dev);
}

static void section_set_arguments(void)
{
	int dev = open_bound(SOURCE), fd;
	struct mig_state argument;
	struct { struct mig_state state; uint64_t beyond; } larger = {
		{ 24, SET | MIG_DEVICE_STATE, STOP_COPY, 12345 }, 0x2222,
	};

	say("argsz 8 = %s", outcome(feature(dev, SET | MIG_DEVICE_STATE, 8)));
	say("argsz 15 = %s", outcome(feature(dev, SET | MIG_DEVICE_STATE, 15)));
	say_state(dev);
	say("argsz 24, with a data_fd in it = %s", outcome(ioctl(dev, DEVICE_FEATURE, &larger)));
	fd = larger.state.data_fd;
	say("and then argsz %u flags %#x device_state %s %s, behind it %#llx", larger.state.argsz,
	    larger.state.flags, state_name(larger.state.device_state), fd_text(fd),
	    (unsigned long long)larger.beyond);
	close(fd);
	argument = (struct mig_state){ 16, PROBE | SET | MIG_DEVICE_STATE, STOP, UNTOUCHED };
	say("PROBE of SET = %s, %s", outcome(ioctl(dev, DEVICE_FEATURE, &argument)),
	    fd_text(argument.data_fd));
	say_state(dev);
	close(dev);
}

static void section_set_cut(void)
{
	int dev = open_bound(SOURCE);
	struct mig_state argument = { 16, SET | MIG_DEVICE_STATE, STOP, UNTOUCHED };

	say("payload cut off = %s", outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 16, 8))));
	say("payload cut at 4 bytes = %s",
	    outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 16, 12))));
	say_state(dev);
	close(dev);
}

static void section_set_full_table(void)
{
	int dev = open_bound(SOURCE), fd;
	char byte;

	exhaust_descriptors();
	say_set(dev, STOP_COPY);
	say_state(dev);
	say_set(dev, STOP);
	say_set(dev, RESUMING);
	say_state(dev);
	say_reset(dev);
	say_set(dev, PRE_COPY);
	say_state(dev);
	restore_descriptors();
	say_set(dev, PRE_COPY);
	say_set(dev, RUNNING);
	fd = say_set(dev, PRE_COPY);
	say("read = %s", outcome(read(fd, &byte, 1)));
	close(fd);
	close(dev);
}

/* ---- Failing arcs. ---- */

static void section_failing_arcs(void)
{
	static const int numbers[] = { EOPNOTSUPP, ENOTTY, EFAULT, EIO, EBUSY, ENODEV };
	int dev = open_bound(COMMANDED), fd;
	struct mig_state argument = { 16, SET | MIG_DEVICE_STATE, STOP_COPY, UNTOUCHED };
	char byte;

	for (int at = 0; at < 6; at++) {
		fail_arc(dev, RUNNING, RUNNING_P2P, numbers[at], STAYS);
		say_set(dev, STOP);
	}
	say_state(dev);
	say("half way, in RUNNING_P2P:");
	fail_arc(dev, RUNNING_P2P, STOP, EIO, STAYS);
	say_set(dev, STOP_COPY);
	say_state(dev);
	say("half way, in STOP:");
	fail_arc(dev, STOP, STOP_COPY, ENOSPC, STAYS);
	say_set(dev, STOP_COPY);
	say_state(dev);
	say("hidden by memory that cannot be written:");
	say("SET STOP_COPY = %s", outcome(ioctl(dev, DEVICE_FEATURE, read_only(&argument, 16))));
	say_state(dev);
	say("an arc before the failing one ends the session:");
	clear_commands(dev);
	fd = go(dev, STOP_COPY);
	fail_arc(dev, STOP, RUNNING_P2P, EAGAIN, STAYS);
	say_set(dev, RUNNING);
	say_state(dev);
	say("read = %s", outcome(read(fd, &byte, 1)));
	close(fd);
	clear_commands(dev);
	say("a session that did not end goes on:");
	fd = go(dev, STOP_COPY);
	fail_arc(dev, STOP_COPY, STOP, EBUSY, STAYS);
	say_set(dev, STOP);
	say_state(dev);
	say("read = %s", outcome(read(fd, &byte, 1)));
	close(fd);
	close(dev);
}

static void section_whole(void)
{
	int dev = open_bound(WHOLE), fd;
	char bytes[8] = "";
	ssize_t count;

	say_state(dev);
	fd = say_set(dev, STOP_COPY);
	count = read(fd, bytes, sizeof(bytes));
	say("read = %s, %.5s", outcome(count), bytes);
	say("a state that is left unset:");
	say_set(dev, STOP);
	say_state(dev);
	say("read = %s", outcome(read(fd, bytes, 1)));
	close(fd);
	say_reset(dev);
	say("a session before the state is reached:");
	say_set(dev, RESUMING);
	say_state(dev);
	say_set(dev, RUNNING);
	close(dev);
}

/* ---- Reset, close. ---- */

static void section_reset(void)
{
	int dev = open_bound(COMMANDED);
	char byte = 0;

	for (uint32_t state = 1; state < 8; state++) {
		int fd = go(dev, state);

		say("from %s:", state_name(state));
		say_reset(dev);
		say_state(dev);
		if (fd < 0)
			continue;
		say("read = %s", outcome(read(fd, &byte, 1)));
		say("write = %s", outcome(write(fd, &byte, 1)));
		close(fd);
		fd = say_set(dev, STOP_COPY);
		say("read of a new session = %s", outcome(read(fd, &byte, 1)));
		close(fd);
		say_reset(dev);
	}
	say("a reset that fails:");
	command16(dev, 0x0E, EINVAL);
	say_reset(dev);
	say_state(dev);
	say_reset(dev);
	say_state(dev);
	close(dev);
}

static void section_close(void)
{
	int dev, fd = -1, held;
	char byte = 0;

	for (uint32_t state = 1; state < 8; state++) {
		dev = open_bound(COMMANDED);
		fd = go(dev, state);
		held = dup(dev);
		close(dev);
		say("%s, a copy of the device is left: state %s", state_name(state),
		    state_name(state_of(held)));
		close(held);
		if (fd >= 0) {
			say("read after the last close = %s", outcome(read(fd, &byte, 1)));
			say("write after the last close = %s", outcome(write(fd, &byte, 1)));
			close(fd);
		}
		dev = open_device(COMMANDED);
		say("PROBE MIGRATION, not bound = %s", outcome(feature(dev, PROBE | MIGRATION, 8)));
		close(dev);
		dev = open_bound(COMMANDED);
		say_state(dev);
		close(dev);
	}
	dev = open_bound(COMMANDED);
	fail_arc(dev, RUNNING, RUNNING_P2P, EIO, FATAL);
	say_set(dev, STOP);
	close(dev);
	dev = open_bound(COMMANDED);
	say("closed in ERROR, opened again:");
	say_state(dev);
	close(dev);
}

static void section_unknown(void)
{
	int dev = open_bound(SOURCE), saving = go(dev, STOP_COPY), other = open_bound(DESTINATION);
	int resuming = go(other, RESUMING);
	struct precopy_info info = { .argsz = sizeof(info) };

	say("device, V6's request = %s", outcome(ioctl(dev, DEVICE_MIG_SET_STATE, &info)));
	say("device, unknown = %s", outcome(ioctl(dev, UNKNOWN_REQUEST, &info)));
	say("saving, unknown = %s", outcome(ioctl(saving, UNKNOWN_REQUEST, &info)));
	say("saving, FEATURE = %s", outcome(ioctl(saving, DEVICE_FEATURE, &info)));
	say("saving, RESET = %s", outcome(ioctl(saving, DEVICE_RESET)));
	say("saving, BIND = %s", outcome(bind_to(saving, saving)));
	say("saving, FIONREAD = %s", outcome(ioctl(saving, FIONREAD, &info)));
	say("saving, TIOCGWINSZ = %s", outcome(ioctl(saving, TIOCGWINSZ, &info)));
	say("resuming, unknown = %s", outcome(ioctl(resuming, UNKNOWN_REQUEST, &info)));
	say("resuming, PRECOPY_INFO = %s", outcome(ioctl(resuming, MIG_GET_PRECOPY_INFO, &info)));
	say("resuming, FIONREAD = %s", outcome(ioctl(resuming, FIONREAD, &info)));
	say("a closed descriptor = %s", outcome(ioctl(900, DEVICE_FEATURE, &info)));
	say("standard output = %s", outcome(ioctl(1, DEVICE_FEATURE, &info)));
	say_state(dev);
	close(saving);
	close(resuming);
	close(other);
	close(dev);
}

static const struct section sections[] = {
	{ "PROBE of every index", section_probe },
	{ "the header of FEATURE", section_feature_header },
	{ "MIGRATION", section_migration },
	{ "MIG_DATA_SIZE", section_data_size },
	{ "GET", section_get },
	{ "SET", section_set },
	{ "SET: refused targets", section_set_refused },
	{ "SET: arguments", section_set_arguments },
	{ "SET: memory that ends", section_set_cut },
	{ "SET: read-only memory", section_set_unwritable },
	{ "SET: no descriptor left", section_set_full_table },
	{ "arcs that fail", section_failing_arcs },
	{ "ERROR", section_error },
	{ "devices with whole control", section_whole },
	{ "RESET", section_reset },
	{ "last close", section_close },
	{ "last close, again and again", section_close_at_once },
	{ "unknown requests", section_unknown },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	return run_sections(sections, argc, argv);
}
