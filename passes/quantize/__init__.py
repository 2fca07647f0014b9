"""From the float graph to the fake-quantised one."""
