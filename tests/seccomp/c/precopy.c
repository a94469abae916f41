/*
 * Pre-copy in the landed dialect, and whole migrations in every way that the states allow.
 */
#include "landed.h"

/* ---- Pre-copy. ---- */

static void say_info(int fd, uint32_t argsz, uint32_t flags)
{
	struct precopy_info info = {
		.argsz = argsz, .flags = flags, .initial_bytes = 77, .dirty_bytes = 77,
	};
	long result = ioctl(fd, MIG_GET_PRECOPY_INFO, &info);

	say("INFO argsz %u = %s, argsz %u flags %#x initial %llu dirty %llu", argsz, outcome(result),
	    info.argsz, info.flags, (unsigned long long)info.initial_bytes,
	    (unsigned long long)info.dirty_bytes);
}

static void section_precopy(void)
{
	int dev = open_bound(COMMANDED), fd = say_set(dev, PRE_COPY);
	struct bytes seen = { 0 }, expected;
	unsigned char buffer[1000];
	ssize_t count = read(fd, buffer, sizeof(buffer));

	expect_state(&expected);
	say("read = %s, as expected: %s", outcome(count),
	    yes_no(!memcmp(buffer, expected.data, sizeof(buffer))));
	say_info(fd, 24, 0);
	say_set(dev, PRE_COPY_P2P);
	say_info(fd, 24, 0);
	read_all(fd, &seen, 3000);
	say("%zu bytes more, then %s", seen.size, strerrorname_np(errno));
	say_info(fd, 24, 0);
	say("read = %s", outcome(read(fd, buffer, 1)));
	say("read of 0 bytes = %s", outcome(read(fd, buffer, 0)));
	say_set(dev, PRE_COPY);
	say_set(dev, STOP_COPY);
	read_all(fd, &seen, 3000);
	say("%zu bytes so far, then %s", seen.size, errno ? strerrorname_np(errno) : "the end");
	say("the rest as expected: %s", yes_no(!memcmp(seen.data, expected.data + 1000, 7192)));
	say("read = %s", outcome(read(fd, buffer, 1)));
	say_info(fd, 24, 0);
	say_set(dev, STOP);
	say("read = %s", outcome(read(fd, buffer, 1)));
	close(fd);
	say("to STOP_COPY before anything was read:");
	fd = say_set(dev, PRE_COPY_P2P);
	say_set(dev, STOP_COPY);
	seen.size = 0;
	read_all(fd, &seen, 100000);
	say("%s", same(&seen, &expected));
	close(fd);
	close(dev);
}

static void section_precopy_info(void)
{
	int dev = open_bound(COMMANDED), plain = open_bound(PLAIN), fd, other;
	struct precopy_info info = { .argsz = 24 };
	char byte;

	fd = go(plain, STOP_COPY);
	say("a device without PRE_COPY = %s", outcome(ioctl(fd, MIG_GET_PRECOPY_INFO, &info)));
	close(fd);
	fd = go(dev, RESUMING);
	say("a resuming data_fd = %s", outcome(ioctl(fd, MIG_GET_PRECOPY_INFO, &info)));
	close(fd);
	ioctl(dev, DEVICE_RESET);
	fd = go(dev, STOP_COPY);
	say("in STOP_COPY:");
	say_info(fd, 24, 0);
	say_info(fd, 23, 0);
	say("no memory = %s", outcome(ioctl(fd, MIG_GET_PRECOPY_INFO, NULL)));
	close(fd);
	go(dev, STOP);
	fd = go(dev, PRE_COPY);
	say("in PRE_COPY:");
	say_info(fd, 0, 0);
	say_info(fd, 23, 0);
	say_info(fd, 24, 0);
	say_info(fd, 32, 0);
	say("no memory = %s", outcome(ioctl(fd, MIG_GET_PRECOPY_INFO, NULL)));
	say("cut at 16 bytes = %s", outcome(ioctl(fd, MIG_GET_PRECOPY_INFO, at_edge(&info, 24, 16))));
	say("read-only memory = %s", outcome(ioctl(fd, MIG_GET_PRECOPY_INFO, read_only(&info, 24))));
	go(dev, RUNNING);
	say("after the session:");
	say_info(fd, 24, 0);
	say("read = %s", outcome(read(fd, &byte, 1)));
	other = go(dev, PRE_COPY);
	say("in a later session:");
	say_info(fd, 24, 0);
	say_info(other, 24, 0);
	say("read = %s", outcome(read(fd, &byte, 1)));
	close(other);
	close(fd);
	close(plain);
	close(dev);
}

static void section_precopy_v2(void)
{
	int dev = open_bound(COMMANDED), fd = go(dev, PRE_COPY);

	say("without the opt-in:");
	say_info(fd, 24, 0xDEAD);
	say("PROBE = %s", outcome(feature(dev, PROBE | SET | MIG_PRECOPY_INFOv2, 8)));
	say_info(fd, 24, 0xDEAD);
	say("SET, argsz 7 = %s", outcome(feature(dev, SET | MIG_PRECOPY_INFOv2, 7)));
	say("GET = %s", outcome(feature(dev, GET | MIG_PRECOPY_INFOv2, 16)));
	say("no operation = %s", outcome(feature(dev, MIG_PRECOPY_INFOv2, 8)));
	say_info(fd, 24, 0xDEAD);
	say("SET = %s", outcome(feature(dev, SET | MIG_PRECOPY_INFOv2, 8)));
	say("again, with a payload = %s", outcome(feature(dev, SET | MIG_PRECOPY_INFOv2, 16)));
	say_info(fd, 24, 0xDEAD);
	close(fd);
	say_reset(dev);
	fd = go(dev, PRE_COPY);
	say("after a reset:");
	say_info(fd, 24, 0xDEAD);
	close(fd);
	close(dev);
	dev = open_bound(COMMANDED);
	fd = go(dev, PRE_COPY);
	say("after the last close:");
	say_info(fd, 24, 0xDEAD);
	close(fd);
	close(dev);
}

/* The device has 100 bytes of new initial data and 200 that changed, beside what it sent. */
static void section_reinit(void)
{
	int dev = open_bound(COMMANDED), fd = go(dev, PRE_COPY);
	uint8_t one = 1;

	say_info(fd, 24, 0);
	command(dev, 0x14, &one, 1);
	say("without the opt-in initial_bytes never rises:");
	say_info(fd, 24, 0);
	need(!feature(dev, SET | MIG_PRECOPY_INFOv2, 8), "the opt-in");
	say("with it, REINIT:");
	say_info(fd, 24, 0);
	close(fd);
	close(dev);
}

/* ---- Whole migrations. ---- */

static void save_all(int dev, struct bytes *into)
{
	int fd = go(dev, STOP_COPY);

	read_all(fd, into, 100000);
	close(fd);
}

/* Take a device along a path, reading whatever its session has in each state. */
static void save_along(int dev, const char *path, struct bytes *into)
{
	int fd = -1;

	for (; *path; path++) {
		int opened = go(dev, *path - '0');

		if (opened >= 0)
			fd = opened;
		if (fd >= 0)
			read_all(fd, into, 10000);
	}
	close(fd);
}

static void load_along(int dev, const char *path, const struct bytes *from)
{
	int fd = go(dev, RESUMING);

	need(!write_all(fd, from, 7777), "write");
	close(fd);
	for (; *path; path++)
		go(dev, *path - '0');
}

static void say_migration(const char *save_path, const char *load_path)
{
	static const char mark[] = "written by a client";
	int source = open_bound(SOURCE), destination = open_bound(DESTINATION);
	struct bytes stream = { 0 }, before = { 0 }, after = { 0 };
	char seen[sizeof(mark)] = "";

	ioctl(source, DEVICE_RESET);
	ioctl(destination, DEVICE_RESET);
	need(pwrite(source, mark, sizeof(mark), bar0_offset(source) + 0x100) > 0, "pwrite");
	save_all(source, &before);
	go(source, RUNNING);
	save_along(source, save_path, &stream);
	load_along(destination, load_path, &stream);
	need(pread(destination, seen, sizeof(seen), bar0_offset(destination) + 0x100) > 0, "pread");
	say("saved along %s, loaded along %s: state %s, BAR0 %s", save_path, load_path,
	    state_name(state_of(destination)), strcmp(seen, mark) ? "different" : "the same");
	save_all(destination, &after);
	say("saved again: %s", same(&before, &after));
	free(stream.data);
	free(before.data);
	free(after.data);
	close(source);
	close(destination);
}

static void section_migration(void)
{
	say_migration("3", "1");
	say_migration("3", "12");
	say_migration("13", "2");
	say_migration("53", "52");
	say_migration("513", "152");
	say_migration("63", "2");
	say_migration("673", "52");
	say_migration("573", "1");
	say_migration("76763", "1");
}

static const struct section sections[] = {
	{ "pre-copy", section_precopy },
	{ "INFO", section_precopy_info },
	{ "version 2", section_precopy_v2 },
	{ "REINIT", section_reinit },
	{ "migration", section_migration },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	return run_sections(sections, argc, argv);
}
