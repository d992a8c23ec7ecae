"""The stand-ins together: import this before anything is asked of a device. `conftest` has loaded the driver."""

import fused
import host
import ranks

host.install()
fused.install()
ranks.install()
