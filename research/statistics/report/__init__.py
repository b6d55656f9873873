"""The report of a comparison: one HTML file, the same in Markdown, tables for LaTeX.

content      what a report tells, as plain values
sections     what is said of it, section by section: about_arms, about_differences,
             about_searches, about_runs
study        a report made of arms and their comparisons
blocks       what a section is made of: sentences, tables, figures
tables       a table as Markdown and LaTeX;  numbers: how numbers are written
page         the HTML file;  styles: its look;  files: all of it written into a folder
"""
