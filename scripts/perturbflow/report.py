def report(benchmark, report):
    pass
