/* pykd.pyd is linked with the .NET runtime, which Wine does not have: this stands in for it and answers "not implemented" to everything. */
#include <windows.h>

static HRESULT WINAPI query(void *self, REFIID id, void **out) { (void)id; *out = self; return S_OK; }
static ULONG WINAPI count(void *self) { (void)self; return 1; }
static HRESULT WINAPI refuse(void *self) { (void)self; return E_NOTIMPL; }
static void *methods[32] = {query, count, count,
    refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse,
    refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse, refuse};
static void *object[1] = {methods};

__declspec(dllexport) HRESULT WINAPI CLRCreateInstance(REFCLSID class_id, REFIID id, void **out)
{
    (void)class_id, (void)id;
    *out = object;
    return S_OK;
}
