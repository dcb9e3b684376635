"""The report of a run: one HTML page that needs nothing else, and its pictures as PNG files.

`run.py` reads the folder of a run; `matching.py`, `curves.py`, `pixels.py` compute what the page shows;
`figures.py` and `photos.py` draw it; each section is a function in a `section_*.py`, and a line in
`build.py`; `page.py` is the HTML.
"""
