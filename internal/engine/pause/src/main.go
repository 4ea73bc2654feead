// Command src is the pause program, the process that holds a pod's namespaces open: as process 1 of
// a shared PID namespace it reaps orphans, and it ends on SIGTERM and SIGINT. All of it is the
// assembler function start; build takes that function's bytes alone and wraps them into an ELF
// file, so the Go runtime that go build links around it never reaches an image.
package main

func start()

func main() { start() }
