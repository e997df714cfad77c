"""Programs that search with other libraries; `study.py` runs each in its environment, as `python FILE FOLDER OPTIONS`.

They print one line of JSON: how many trials they trained, the steps and the validation accuracy of each, and seconds.
"""
