"""A module whose import takes a second: a fork server that starts with it answers late."""

import time

time.sleep(1)
