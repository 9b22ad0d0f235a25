"Requirements and extras come from settings.ini, and results/ goes into the package; everything else is in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read('settings.ini', encoding='utf-8')
reqs = {k: [r.strip() for r in v.splitlines() if r.strip()] for k, v in cfg['DEFAULT'].items()}
core = reqs.pop('requirements')


class build_with_results(build_py):
    "Lay results/*.json beside the package's other assets; an editable install reads them where they are."
    def run(self):
        super().run()
        if self.editable_mode: return
        for f in sorted(Path('results').glob('*.json')):
            into = Path(self.build_lib, 'hedgehog_nb/assets/results')
            self.mkpath(str(into))
            self.copy_file(str(f), str(into/f.name))


setup(install_requires=core, extras_require={k.removesuffix('_requirements'): v for k, v in reqs.items()}, cmdclass=dict(build_py=build_with_results))
