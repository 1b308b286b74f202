"""A hand-written C++ kernel for processors, where it was built."""
