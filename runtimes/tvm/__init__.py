"""The TVM runtime: mask-specialised machine code. TVM is imported only here, and only when used."""
