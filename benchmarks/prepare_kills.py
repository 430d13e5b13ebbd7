# SPDX-License-Identifier: Apache-2.0
"""python benchmarks/prepare_kills.py [KILLS]: kills conversions at random moments until each is through; compares the bytes.

From class folders and from archives in turn. Each conversion is started again after every kill; when it gets through before
its moment comes, its output is compared with that of an undisturbed run, and the next one begins.
"""

import filecmp
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from prepare_vs_im2rec import ROOT, make


def main():
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    folder = tempfile.mkdtemp()
    moments, kills, finished, places = random.Random(1), 0, 0, {}
    try:
        make(folder, 6000, 60, 50)
        command = [sys.executable, "-m", "prepare.imagenet"]
        whole, out = os.path.join(folder, "whole"), os.path.join(folder, "out")
        start = time.perf_counter()
        subprocess.run(
            command + [os.path.join(folder, "folders"), whole],
            check=True,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        longest = time.perf_counter() - start
        while kills < wanted or os.path.exists(out):
            source = os.path.join(folder, ("folders", "archives")[finished % 2])
            process = subprocess.Popen(command + [source, out], cwd=ROOT, stdout=subprocess.DEVNULL)
            try:
                status = process.wait(moments.uniform(0.1, longest) if kills < wanted else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                place = (
                    " ".join(sorted(os.listdir(out)))
                    if os.path.exists(out)
                    else "nothing written yet"
                )
                places[place] = places.get(place, 0) + 1
                continue
            assert status == 0, "exit status %d" % status
            for name in [
                half + suffix
                for half in ("train", "val")
                for suffix in (".rec", ".idx", ".lst", ".sums")
            ]:
                same = filecmp.cmp(
                    os.path.join(whole, name), os.path.join(out, name), shallow=False
                )
                assert same, "%s differs after %d kills" % (name, kills)
            shutil.rmtree(out)
            finished += 1
        print(
            "%d kills in %d conversions, every result byte-identical; what stood in the folder at a kill:"
            % (kills, finished)
        )
        for place, count in sorted(places.items(), key=lambda item: -item[1]):
            print("%4d  %s" % (count, place))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
