/*
 * Memory of all kinds for a device, and accesses of it, for the programs that map some. Devices
 * are commanded ones: they write 64 bytes and read 16 wherever they are told to.
 */
#include "check.h"

#define BUS ((uint64_t)0x40000000)
#define PAGE 4096ull
#define PAGES 64ull

HELPER void *anonymous(uint64_t length)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	need(memory != MAP_FAILED, "mmap");
	return memory;
}

HELPER int new_memfd(uint64_t length, bool sealed)
{
	int fd = memfd_create("guest memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	need(fd >= 0 && !ftruncate(fd, length), "memfd");
	need(!sealed || !fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), "seals");
	return fd;
}

HELPER void *shared(int fd, uint64_t length, uint64_t offset)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);

	need(memory != MAP_FAILED, "mmap");
	return memory;
}

/* Tell the device to access memory; the errno that it met, or 0. */
HELPER uint32_t dma(int dev, unsigned int how, uint64_t iova)
{
	uint32_t result;

	command(dev, how, &iova, 8);
	need(pread(dev, &result, 4, bar0_offset(dev) + 0x20) == 4, "the result of an access");
	return result;
}

/* What 16 bytes the device reads there. */
HELPER const char *dma_text(int dev, uint64_t iova)
{
	static char text[17];
	uint32_t number = dma(dev, 0x28, iova);

	if (number)
		return strerrorname_np(number);
	need(pread(dev, text, 16, bar0_offset(dev) + 0x30) == 16, "what was read");
	return text;
}

HELPER const char *failed(uint32_t number)
{
	return number ? strerrorname_np(number) : "0";
}

HELPER const char *written(const void *memory)
{
	const unsigned char *bytes = memory;

	for (int at = 0; at < 64; at++)
		if (bytes[at] != 0xD1)
			return "no";
	return "yes";
}
