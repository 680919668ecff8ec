"""A bad line between two tap devices: delays every frame, and drops some. Run by `Network.bad_line`."""

import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def main() -> None:
    first, second, delay, loss = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
    files = []
    for name in (first, second):
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
        files.append(file)
    other = {files[0]: files[1], files[1]: files[0]}
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select(files, [], [], pause)
        now = time.monotonic()
        for file in ready:
            frame = os.read(file, 65536)
            if random.random() >= loss:
                number += 1
                heapq.heappush(waiting, (now + delay, number, other[file], frame))
        while waiting and waiting[0][0] <= now:
            _, _, file, frame = heapq.heappop(waiting)
            try:
                os.write(file, frame)
            except BlockingIOError:
                continue  # a full device drops, as a full line does


if __name__ == "__main__":
    main()
