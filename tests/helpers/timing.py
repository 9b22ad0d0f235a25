"Benchmarks in a test are about what is done with the numbers, not about the numbers."
from hedgehog_nb.experiments import bench

def measured_quickly(monkeypatch):
    "Each contender runs four times, not for two seconds, within this process."
    medians = bench.medians
    monkeypatch.setattr(bench, 'medians', lambda fs, device, budget_s=0., errors=None: medians(fs, device, 0., errors))
