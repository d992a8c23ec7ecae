"""The kernels that come with the library: plugins like any other, found through their entry points."""
