"""A plugin whose kernel package is missing."""

import package_that_does_not_exist  # noqa: F401
