#!/bin/busybox sh
# The guest's first process: mounts, loads the modules in their order, and runs the shell that
# the host talks to on the second serial port. When that shell ends, its exit status goes to the
# isa-debug-exit device at port 0xf4, which ends QEMU with twice the status and one.
#
# The first serial port is the console: the kernel's messages, and nothing that a test relies on.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/tmp TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do
    insmod "/modules/$module" || echo "vfiomig: $module is not loaded"
done </modules/order

# Open from here to the end: at each first opening the driver throws received bytes away.
exec 3<>/dev/ttyS1
# Bytes as they are: no echo, no line editing, no carriage returns.
stty raw -echo <&3
cd /tmp
echo 'vfiomig: ready' >&3
# As a script, so that it neither prompts nor echoes.
sh /dev/ttyS1 </dev/null >&3 2>&1 3<&-
status=$?

# Closing waits until everything that was written is out.
exec 3<&-
[ "$status" -le 127 ] || status=127
printf "\\$(printf %03o "$status")" | dd of=/dev/port bs=1 seek=244 2>/dev/null
# A machine without the device is switched off; one that cannot even be must not go on.
poweroff -f
