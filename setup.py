"Requirements and extras come from settings.ini; everything else is in pyproject.toml."
from configparser import ConfigParser
from setuptools import setup

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read('settings.ini', encoding='utf-8')
reqs = {k: [r.strip() for r in v.splitlines() if r.strip()] for k, v in cfg['DEFAULT'].items()}
core = reqs.pop('requirements')

setup(install_requires=core, extras_require={k.removesuffix('_requirements'): v for k, v in reqs.items()})
