/*
 * Changes of state in the landed dialect, for the programs that speak it. Devices:
 * vfio0 and vfio1 a pair that can do everything, vfio2 commanded, vfio3 commanded without P2P and
 * PRE_COPY, vfio4 one that cannot migrate, vfio5 one that does whole requests, and badly.
 */
#include "check.h"

enum { SOURCE, DESTINATION, COMMANDED, PLAIN, UNABLE, WHOLE };

HELPER long set_state(int dev, uint32_t target, struct mig_state *argument)
{
	*argument = (struct mig_state){
		.argsz = 16, .flags = SET | MIG_DEVICE_STATE,
		.device_state = target, .data_fd = UNTOUCHED,
	};
	return ioctl(dev, DEVICE_FEATURE, argument);
}

/* SET, and say all that came back; return the data_fd. */
HELPER int say_set(int dev, uint32_t target)
{
	struct mig_state argument;
	long result = set_state(dev, target, &argument);

	say("SET %s = %s, device_state %s, %s", state_name(target), outcome(result),
	    state_name(argument.device_state), fd_text(argument.data_fd));
	return argument.data_fd;
}

/* SET that is no observation of its own; return the data_fd, -1 if none. */
HELPER int go(int dev, uint32_t target)
{
	struct mig_state argument;

	need(!set_state(dev, target, &argument), state_name(target));
	return argument.data_fd;
}

HELPER void say_get(int dev)
{
	struct mig_state argument = {
		.argsz = 16, .flags = GET | MIG_DEVICE_STATE, .device_state = 99, .data_fd = UNTOUCHED,
	};
	long result = ioctl(dev, DEVICE_FEATURE, &argument);

	say("GET = %s, device_state %s, %s", outcome(result), state_name(argument.device_state),
	    fd_text(argument.data_fd));
}

HELPER uint32_t state_of(int dev)
{
	struct mig_state argument = { .argsz = 16, .flags = GET | MIG_DEVICE_STATE };

	need(!ioctl(dev, DEVICE_FEATURE, &argument), "GET");
	return argument.device_state;
}

HELPER void say_reset(int dev)
{
	say("RESET = %s", outcome(ioctl(dev, DEVICE_RESET)));
}

/* The state of a commanded device after power-on. */
HELPER void expect_state(struct bytes *bytes)
{
	bytes->size = 8192;
	bytes->data = malloc(bytes->size);
	for (size_t n = 0; n < bytes->size; n++)
		bytes->data[n] = n + n / 251;
}
