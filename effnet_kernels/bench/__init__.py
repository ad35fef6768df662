"""Measuring: the kernels and whole models beside their peers, with the error in the same row.

``timing`` takes samples, ``environment`` describes the machine and measures its two ceilings,
``accuracy`` holds the rule that makes a row right or wrong, ``traffic`` counts bytes and FLOPs,
``shapes`` derives the models' shapes, ``results`` is the JSON, ``report`` its table and plot,
``command`` the command line. The suites are one file an op, on what ``kernels`` holds for all of
them, and ``models``. The kernels import nothing from here. ``rich`` and ``matplotlib``, for the
table and the plot, come with ``pip install effnet_kernels[bench]``.
"""
