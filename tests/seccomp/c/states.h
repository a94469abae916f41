/*
 * Changes of state and what is seen of them, in either dialect: whoever includes this defines the
 * four functions that are declared first. Devices: vfio0 and vfio1 a pair that can do everything,
 * vfio2 commanded, vfio3 commanded without P2P and PRE_COPY, vfio4 one that cannot migrate, vfio5
 * one that does whole requests, and badly.
 */
#include "check.h"

enum { SOURCE, DESTINATION, COMMANDED, PLAIN, UNABLE, WHOLE };

/* What came back; errno is as the request left it. */
struct reply { long result; uint32_t device_state; int data_fd; };

static int open_for_use(int number);
/* Ask for a state; the data_fd that is handed over is UNTOUCHED. */
static struct reply request(int dev, uint32_t target, bool in_read_only_memory);
static uint32_t state_of(int dev);
/* Say what is told of the state by whoever only asks. */
static void say_state(int dev);

/* SET, and say all that came back; return the data_fd. */
HELPER int say_set(int dev, uint32_t target)
{
	struct reply reply = request(dev, target, false);

	say("SET %s = %s, device_state %s, %s", state_name(target), outcome(reply.result),
	    state_name(reply.device_state), fd_text(reply.data_fd));
	return reply.data_fd;
}

/* SET that is no observation of its own; return the data_fd, -1 if none. */
HELPER int go(int dev, uint32_t target)
{
	struct reply reply = request(dev, target, false);

	need(!reply.result, state_name(target));
	return reply.data_fd;
}

HELPER void say_reset(int dev)
{
	say("RESET = %s", outcome(ioctl(dev, DEVICE_RESET)));
}

HELPER void probe_all(int dev, uint32_t count)
{
	for (uint32_t index = 0; index < count; index++)
		say("index %u: PROBE %s, with GET %s, with SET %s, with both %s", index,
		    outcome(feature(dev, index | PROBE, 8)),
		    outcome(feature(dev, index | PROBE | GET, 8)),
		    outcome(feature(dev, index | PROBE | SET, 8)),
		    outcome(feature(dev, index | PROBE | GET | SET, 8)));
}

HELPER void say_feature_migration(int dev, uint32_t flags, uint32_t argsz)
{
	struct feature argument = {
		.argsz = argsz, .flags = flags | MIGRATION, .payload = { 0x1111, 0x2222 },
	};
	long result = ioctl(dev, DEVICE_FEATURE, &argument);

	say("flags %#x argsz %u = %s, header %u %#x, payload %#llx, then %#llx", flags, argsz,
	    outcome(result), argument.argsz, argument.flags,
	    (unsigned long long)argument.payload[0], (unsigned long long)argument.payload[1]);
}

/* ---- Sections that both dialects have. ---- */

HELPER void section_set(void)
{
	int dev = open_for_use(SOURCE), first, second;
	char byte;

	say_set(dev, RUNNING);
	say_set(dev, STOP);
	say_set(dev, STOP);
	first = say_set(dev, STOP_COPY);
	say("the same state once more:");
	say_set(dev, STOP_COPY);
	say("read of the session = %s", outcome(read(first, &byte, 1)));
	say_set(dev, STOP);
	second = say_set(dev, STOP_COPY);
	say("a file of its own for each session: %s", yes_no(first != second));
	say("read of the first = %s", outcome(read(first, &byte, 1)));
	say("read of the second = %s", outcome(read(second, &byte, 1)));
	close(first);
	close(second);
	say("closing a data_fd changes no state:");
	say_state(dev);
	say_set(dev, STOP_COPY);
	first = say_set(dev, RESUMING);
	say("RESUMING once more:");
	say_set(dev, RESUMING);
	close(first);
	say_reset(dev);
	say_state(dev);
	close(dev);
}

/* What memory that cannot be written does to a SET: the change happens, the descriptor does not. */
HELPER void section_set_unwritable(void)
{
	int dev = open_for_use(SOURCE), fd, before, after;
	char byte;

	say("STOP = %s", outcome(request(dev, STOP, true).result));
	say_state(dev);
	say("9 = %s", outcome(request(dev, 9, true).result));
	before = dup(1);
	close(before);
	say("STOP_COPY = %s", outcome(request(dev, STOP_COPY, true).result));
	after = dup(1);
	close(after);
	say("a descriptor left behind: %s", yes_no(before != after));
	say_state(dev);
	say("the session without a descriptor stays:");
	say_set(dev, STOP_COPY);
	say_set(dev, STOP);
	fd = say_set(dev, STOP_COPY);
	say("read = %s", outcome(read(fd, &byte, 1)));
	close(fd);
	close(dev);
}

HELPER void section_error(void)
{
	static const enum failure kinds[] = { FATAL, BUG };
	char byte;

	for (int at = 0; at < 2; at++) {
		int dev = open_for_use(COMMANDED), fd = go(dev, STOP_COPY);

		say(at ? "by a bug:" : "by a failure that says so:");
		fail_arc(dev, STOP_COPY, STOP, ENOLINK, kinds[at]);
		say_set(dev, STOP);
		say_state(dev);
		say("read = %s", outcome(read(fd, &byte, 1)));
		close(fd);
		for (uint32_t state = 0; state < 9; state++)
			say_set(dev, state);
		say("PROBE MIGRATION = %s", outcome(feature(dev, PROBE | MIGRATION, 8)));
		say_reset(dev);
		say_state(dev);
		fd = say_set(dev, STOP_COPY);
		close(fd);
		close(dev);
	}
}

/* Each close is the last one as soon as it has returned, however soon the next open comes. */
HELPER void section_close_at_once(void)
{
	int wrong = 0;

	for (int n = 0; n < 300; n++) {
		int dev = open_for_use(COMMANDED);

		wrong += state_of(dev) != RUNNING;
		go(dev, STOP);
		close(dev);
	}
	say("300 times opened, stopped and closed: %d failures", wrong);
}
