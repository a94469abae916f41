/*
 * What a guest does while it migrates, and checks by itself:
 *
 *   workload disk DEVICE FIRST COUNT   writes blocks of a disk and reads them back
 *   workload loop TTY                  sends bytes through a port that gives them back
 *   workload echo TTY                  gives back what comes through a port
 *
 * It goes on until SIGTERM, then checks once more what it holds. Every line that it prints is its
 * count so far; the last one begins with "done", or says what is wrong.
 *
 * The disk: each block carries its number, how often it was written, and words that follow from
 * both. What a read has filled is looked at only SLOTS reads later, so that memory which the
 * device wrote before a migration is compared after it. A block must be as it was acknowledged.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 16384
#define WORDS (BLOCK / sizeof(uint32_t))
#define SLOTS 64
#define BLOCKS 4096
#define WINDOW 256	/* bytes on their way through the port */
#define PATIENCE_MS 30000

static volatile sig_atomic_t stopped;

static void stop(int number)
{
	(void)number;
	stopped = 1;
}

static void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	printf("\n");
	fflush(stdout);
}

#define fail(...) do { say(__VA_ARGS__); exit(1); } while (0)

/* The disk. */

struct slot {
	uint32_t *words;
	uint32_t block, generation;
};

static int disk;
static uint32_t acknowledged[BLOCKS];

static uint32_t word(uint32_t block, uint32_t generation, uint32_t at)
{
	uint32_t mixed = (block * 4096 + at) * 2654435761u ^ generation * 2246822519u;

	if (!generation)
		return 0;	/* never written */
	return at == 0 ? block : at == 1 ? generation : mixed ^ mixed >> 15;
}

static uint32_t *aligned_block(void)
{
	void *memory;

	if (posix_memalign(&memory, 4096, BLOCK))
		fail("no memory");
	return memset(memory, 0, BLOCK);
}

static void write_block(uint32_t *words, uint32_t block)
{
	uint32_t generation = acknowledged[block] + 1, at;

	for (at = 0; at < WORDS; at++)
		words[at] = word(block, generation, at);
	if (pwrite(disk, words, BLOCK, (off_t)block * BLOCK) != BLOCK)
		fail("writing block %u: %s", block, strerror(errno));
	acknowledged[block] = generation;
}

static void read_block(struct slot *slot, uint32_t block)
{
	slot->block = block;
	slot->generation = acknowledged[block];
	if (pread(disk, slot->words, BLOCK, (off_t)block * BLOCK) != BLOCK)
		fail("reading block %u: %s", block, strerror(errno));
}

static void check(const struct slot *slot)
{
	uint32_t at;

	for (at = 0; at < WORDS; at++)
		if (slot->words[at] != word(slot->block, slot->generation, at))
			fail("block %u was written %u times, but word %u is %#x of block %u, written %u times",
			     slot->block, slot->generation, at, slot->words[at],
			     slot->words[0], slot->words[1]);
}

static void use_disk(const char *path, uint32_t first, uint32_t count)
{
	struct slot slots[SLOTS] = { 0 };
	uint32_t *words = aligned_block(), round, at;

	disk = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
	if (disk < 0 || first + count > BLOCKS)
		fail("%s: %s", path, strerror(errno));
	for (at = 0; at < SLOTS; at++)
		slots[at].words = aligned_block();
	srandom(first + 1);
	for (round = 0; !stopped; round++) {
		struct slot *slot = &slots[round % SLOTS];

		write_block(words, first + random() % count);
		if (round >= SLOTS)
			check(slot);
		read_block(slot, first + random() % count);
		say("%u", round + 1);
	}
	for (at = 0; at < SLOTS && at < round; at++)
		check(&slots[at]);
	for (at = 0; at < count; at++) {
		read_block(&slots[0], first + at);
		check(&slots[0]);
	}
	say("done %u", round);
}

/* The ports. */

static int open_port(const char *path)
{
	int port = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	struct termios settings;

	if (port < 0 || tcgetattr(port, &settings))
		fail("%s: %s", path, strerror(errno));
	cfmakeraw(&settings);
	cfsetspeed(&settings, B115200);
	settings.c_cflag |= CRTSCTS | CLOCAL;
	if (tcsetattr(port, TCSANOW, &settings))
		fail("%s: %s", path, strerror(errno));
	return port;
}

static short await(int port, short events, int milliseconds)
{
	struct pollfd waits = { .fd = port, .events = events };
	int ready = poll(&waits, 1, milliseconds);

	if (ready < 0 && errno != EINTR)
		fail("poll: %s", strerror(errno));
	return ready > 0 ? waits.revents : 0;
}

static size_t take(ssize_t size)
{
	if (size < 0 && errno != EAGAIN && errno != EINTR)
		fail("the port: %s", strerror(errno));
	return size > 0 ? size : 0;
}

static uint8_t byte(uint32_t at)
{
	return at * 2654435761u >> 24 ^ at;
}

static void use_loop(const char *path)
{
	int port = open_port(path);
	uint32_t sent = 0, got = 0, at;
	uint8_t bytes[WINDOW];
	size_t size;

	while (!stopped || got < sent) {
		uint32_t room = stopped ? 0 : WINDOW - (sent - got);
		short ready = await(port, POLLIN | (room ? POLLOUT : 0), PATIENCE_MS);

		if (!ready && !stopped)
			fail("%u bytes have not come back", sent - got);
		if (!ready && got < sent && !await(port, POLLIN, PATIENCE_MS))
			fail("%u of the last bytes have not come back", sent - got);
		if (ready & POLLIN) {
			size = take(read(port, bytes, sizeof(bytes)));
			for (at = 0; at < size; at++, got++)
				if (got >= sent || bytes[at] != byte(got))
					fail("byte %u is %#x, not %#x", got, bytes[at], byte(got));
			say("%u", got);
		}
		if (room && ready & POLLOUT) {
			for (at = 0; at < room; at++)
				bytes[at] = byte(sent + at);
			sent += take(write(port, bytes, room));
		}
	}
	say("done %u", got);
}

static void use_echo(const char *path)
{
	int port = open_port(path);
	uint8_t bytes[4096];
	uint32_t total = 0;

	say("0");
	while (!stopped) {
		size_t size, at = 0;

		await(port, POLLIN, 1000);
		size = take(read(port, bytes, sizeof(bytes)));
		while (at < size) {
			await(port, POLLOUT, 1000);
			at += take(write(port, bytes + at, size - at));
		}
		total += size;
		if (size)
			say("%u", total);
	}
	if (tcdrain(port))
		fail("the port: %s", strerror(errno));
	say("done %u", total);
}

int main(int count, char **words)
{
	struct sigaction action = { .sa_handler = stop };

	sigaction(SIGTERM, &action, NULL);
	if (count == 5 && !strcmp(words[1], "disk"))
		use_disk(words[2], atoi(words[3]), atoi(words[4]));
	else if (count == 3 && !strcmp(words[1], "loop"))
		use_loop(words[2]);
	else if (count == 3 && !strcmp(words[1], "echo"))
		use_echo(words[2]);
	else
		fail("see the beginning of workload.c");
	return 0;
}
