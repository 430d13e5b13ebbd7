# SPDX-License-Identifier: Apache-2.0
"""A program like run_trials.sh whose trials are fake.

Variables:
    PLAN: "status:minutes", "hang", or "lost" for a trial without a log, separated by spaces.
    TEMPLATE: Log of a real trial, with STOP and ACCURACY in place of two values.
    ACCURACY: Fraction for the logs (0.76).
    WITHOUT_KEY: Key of the events to leave out of the logs.
    AFTER: Command of bash at the end of each trial.
    CAN_DROP_CACHES: 1 when the page cache can be dropped.
    CHECKER: "real" for the official checker; else logs with an accuracy of 0.76 are accepted.
"""

import os
import sys

from mxresnet.launch.backends.local import LocalBackend
from mxresnet.launch.processes import run_to_end
from mxresnet.launch.trials import run_trials

TRIAL = """
read -ra plan <<<"$PLAN"; plan=${plan[TRIAL - 1]}
echo "$TRIAL $SEED $CACHE_CLEARED" >>"$LOGDIR.trials"
[ "$plan" != hang ] || exec sleep 60
[ "$plan" != lost ] || exit 0
stop=$((1600000000000 + 60000 * ${plan#*:}))
sed "s/STOP/$stop/; s/ACCURACY/${ACCURACY:-0.76}/; ${WITHOUT_KEY:+/$WITHOUT_KEY/d}
    /\\"seed\\"/s/\\"value\\": [0-9]*/\\"value\\": $SEED/" "$TEMPLATE" \\
    >"$LOGDIR/${DATESTAMP}_$TRIAL.log"
eval "${AFTER-}"
exit "${plan%:*}"
"""


class FakeBackend(LocalBackend):
    def prepare(self, flags):
        pass

    def check_settings(self, trial, flags):
        return 0

    def drop_caches(self):
        return self.environ["CAN_DROP_CACHES"] == "1"

    def run_trial(self, trial, flags):
        env = {**self.environ, **trial.variables(), "LOGDIR": trial.logdir}
        return run_to_end(["bash", "-c", TRIAL], env=env)

    def run_python(self, arguments, stdout, stderr=None):
        fake_checker = self.environ.get("CHECKER") != "real"
        if fake_checker and "mlperf_logging.compliance_checker" in arguments:
            with open(arguments[-1]) as log:
                return int(not any("eval_accuracy" in line and "0.76" in line for line in log))
        return super().run_python(arguments, stdout, stderr)


if __name__ == "__main__":
    sys.exit(run_trials(FakeBackend(os.environ), sys.argv[1:]))
