"""The decode loop: one token per running stream and step, on buffers of the device."""
