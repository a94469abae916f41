/*
 * To be loaded in front of the C library: a shutdown() that takes effect at once and returns
 * seconds later. QEMU shuts the socket of a migration down before it notes that this is a cancel;
 * here its migration thread has the time to meet a socket that is closed, and nobody who closed it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>

int shutdown(int socket, int how)
{
	int (*real)(int, int) = dlsym(RTLD_NEXT, "shutdown");
	int result = real(socket, how);

	sleep(3);
	return result;
}
