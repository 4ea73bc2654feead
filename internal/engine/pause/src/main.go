// Command src is the pause program. Its process holds the namespaces of a pod open. As process 1 of
// a shared PID namespace it reaps orphans. It exits on SIGTERM and SIGINT.
//
// The program consists of the assembly function start. The build command extracts the machine code
// of this function and wraps it into an ELF file, so the image contains no Go runtime.
package main

func start()

func main() { start() }
