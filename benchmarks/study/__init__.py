"""The paper's claims on CIFAR-10, a table of runs a command: python -m benchmarks.study --help"""
