if __name__ != "opreg.kernels":
    raise ImportError("this package is opreg.kernels; install opreg and import it by that name")
