"""What crosses a process boundary. The standard library and cloudpickle only: nodes get it as source."""
