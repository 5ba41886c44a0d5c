if __name__ != "opreg.ops":
    raise ImportError("this package is opreg.ops; install opreg and import it by that name")
