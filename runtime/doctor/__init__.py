"""`job=doctor`: would this run start?"""
