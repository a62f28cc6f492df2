/* A debugger without windows.  host TARGET COMMAND...: opens the target in dbgeng, executes the commands, prints what the engine prints.
 * TARGET: a dump, kd:OPTIONS of a live kernel, proc:COMMAND for a user-mode process, or - for none.  Before each command: "\x02COMMAND\n".
 * A COMMAND that begins with "!dml " has the engine deliver DML instead of its plain text, as WinDbg's window asks for it; "!serve FILE" makes
 * FILE.ready, and lets other debuggers use the session (.server) until there is a FILE. */
#define COBJMACROS
#define INITGUID
#include <stdio.h>
#include <stdlib.h>
#include <windows.h>
#include <dbgeng.h>

static const GUID client_id = {0x27fe5639, 0x8407, 0x4f47, {0x83, 0x64, 0xee, 0x11, 0x8f, 0xb0, 0x8a, 0xc8}};
static const GUID control_id = {0x5182e668, 0x105e, 0x416e, {0xad, 0x92, 0x24, 0xef, 0x80, 0x04, 0x24, 0xba}};
static const GUID output_id = {0x4bf58045, 0xd654, 0x4c40, {0xb0, 0xaf, 0x68, 0x30, 0x90, 0xf3, 0x56, 0xdc}};
static const GUID output2_id = {0x67721fe9, 0x56d2, 0x4a44, {0xa3, 0x25, 0x2b, 0x65, 0x51, 0x3c, 0xe6, 0xeb}};
static int dml;

static void print(const char *text)
{
    DWORD written;
    WriteFile(GetStdHandle(STD_OUTPUT_HANDLE), text, lstrlenA(text), &written, 0);
}

/* IDebugOutputCallbacks2 of Windows 7 and later; the first four methods are IDebugOutputCallbacks. */
static HRESULT WINAPI query(void *self, REFIID id, void **out)
{
    int unknown = id->Data1 == 0 && id->Data4[7] == 0x46;
    *out = unknown || !memcmp(id, &output_id, sizeof *id) || (dml && !memcmp(id, &output2_id, sizeof *id)) ? self : 0;
    return *out ? S_OK : E_NOINTERFACE;
}
static ULONG WINAPI count(void *self) { (void)self; return 1; }
static HRESULT WINAPI output(void *self, ULONG mask, PCSTR text) { (void)self, (void)mask; print(text); return S_OK; }
static HRESULT WINAPI interest(void *self, ULONG *mask) { (void)self; *mask = 7; return S_OK; }    /* text, DML, explicit flushes */
static HRESULT WINAPI output2(void *self, ULONG which, ULONG flags, ULONG64 argument, PCWSTR text)
{
    static char narrow[1 << 18];
    (void)self, (void)flags, (void)argument;
    if (which == 2 || !text) return S_OK;                                                          /* a flush */
    WideCharToMultiByte(CP_ACP, 0, text, -1, narrow, sizeof narrow, 0, 0);
    print(which == 1 ? "\x03" : "\x04");                                                           /* DML, text */
    print(narrow);
    return S_OK;
}
static void *methods[] = {query, count, count, output, interest, output2};
static void *callbacks[] = {methods};

int main(int argc, char **argv)
{
    HMODULE engine = LoadLibraryA("dbgeng.dll");
    HRESULT(WINAPI *create)(REFIID, void **) = engine ? (void *)GetProcAddress(engine, "DebugCreate") : 0;
    IDebugClient *client;
    IDebugControl *control;
    if (argc < 2 || !create || create(&client_id, (void **)&client)) { print("usage: host TARGET COMMAND... (with dbgeng.dll)\n"); return 1; }
    client->lpVtbl->QueryInterface(client, &control_id, (void **)&control);
    client->lpVtbl->SetOutputCallbacks(client, (IDebugOutputCallbacks *)callbacks);
    control->lpVtbl->AddEngineOptions(control, DEBUG_ENGOPT_INITIAL_BREAK);
    const char *target = argv[1];
    int live = !strncmp(target, "kd:", 3);
    if (strcmp(target, "-")) {
        HRESULT h = !strncmp(target, "proc:", 5) ? client->lpVtbl->CreateProcess(client, 0, argv[1] + 5, DEBUG_ONLY_THIS_PROCESS)
                    : live                       ? client->lpVtbl->AttachKernel(client, 0, target + 3)
                                                 : client->lpVtbl->OpenDumpFile(client, target);
        if (!h) h = control->lpVtbl->WaitForEvent(control, 0, 0xffffffff);
        if (h) { printf("cannot open %s: %08lx\n", target, h); fflush(stdout); }
    }
    for (int i = 2; i < argc; i++) {
        char *command = argv[i];
        dml = !strncmp(command, "!dml ", 5);
        if (dml) command += 5;
        client->lpVtbl->SetOutputCallbacks(client, 0);
        client->lpVtbl->SetOutputCallbacks(client, (IDebugOutputCallbacks *)callbacks);
        print("\x02");
        print(command);
        print("\n");
        if (!strncmp(command, "!serve ", 7)) {
            char ready[MAX_PATH];
            snprintf(ready, sizeof ready, "%s.ready", command + 7);
            CloseHandle(CreateFileA(ready, GENERIC_WRITE, 0, 0, CREATE_ALWAYS, 0, 0));
            while (GetFileAttributesA(command + 7) == INVALID_FILE_ATTRIBUTES) client->lpVtbl->DispatchCallbacks(client, 50);
            continue;
        }
        control->lpVtbl->Execute(control, DEBUG_OUTCTL_ALL_CLIENTS, command, DEBUG_EXECUTE_NOT_LOGGED);
        client->lpVtbl->FlushCallbacks(client);
    }
    TerminateProcess(GetCurrentProcess(), 0);                                                      /* the engine may not unload cleanly */
    return 0;
}
