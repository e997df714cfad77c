"""A module whose import takes ten seconds: a fork server that starts with it answers late."""

import time

time.sleep(10)
