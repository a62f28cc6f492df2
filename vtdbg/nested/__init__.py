"""Questions to whole tables of nested paging (EPT, NPT): what matches, what maps a frame, what changed, what is hooked, what is wrong."""
