// Command build builds the embedded pause programs from source. It compiles
// internal/engine/pause/src for each architecture, extracts the machine code of its start function,
// and wraps it into a minimal static ELF file. It needs only the Go toolchain pinned by go.mod, so
// the build is reproducible.
package main

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const (
	sourcePackage = "cri-dockerd/internal/engine/pause/src"
	base          = 0x400000  // load address
	pageSize      = 0x10000   // the largest page size of either architecture
	headers       = 64 + 2*56 // size of the ELF header and two program headers
)

func main() {
	dir := "internal/engine/pause/bin"
	if len(os.Args) > 1 {
		dir = os.Args[1]
	}

	for arch, machine := range machines() {
		b, err := program(arch, machine)
		if err == nil {
			err = replace(filepath.Join(dir, "pause-"+arch), b)
		}

		if err != nil {
			fmt.Fprintf(os.Stderr, "build pause for %s: %v\n", arch, err)
			os.Exit(1)
		}
	}
}

// replace replaces a program by renaming a new file, because the old program may be running.
func replace(file string, program []byte) error {
	if err := os.WriteFile(file+".new", program, 0o755); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func machines() map[string]elf.Machine {
	return map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
}

// program returns the ELF file for one architecture.
func program(arch string, machine elf.Machine) ([]byte, error) {
	tmp, err := os.MkdirTemp("", "pause")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)

	out := filepath.Join(tmp, "linked")
	cmd := exec.Command("go", "build", "-trimpath", "-o", out, sourcePackage)
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, msg)
	}

	code, err := startFunction(out)
	if err != nil {
		return nil, err
	}

	return wrap(code, machine)
}

// startFunction returns the machine code of main.start in a linked program. The function has no
// references to other code or data.
func startFunction(file string) ([]byte, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()

	symbols, err := f.Symbols()
	if err != nil {
		return nil, err
	}

	text := f.Section(".text")
	for _, s := range symbols {
		if strings.HasPrefix(s.Name, "main.start") && s.Size > 0 {
			code := make([]byte, s.Size)
			_, err := text.ReadAt(code, int64(s.Value-text.Addr))
			return code, err
		}
	}

	return nil, fmt.Errorf("%s has no function main.start", file)
}

// wrap returns an ELF file with code as its only loadable segment and a non-executable stack.
func wrap(code []byte, machine elf.Machine) ([]byte, error) {
	size := uint64(headers + len(code))
	var b bytes.Buffer
	head := elf.Header64{
		Ident:     [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:      uint16(elf.ET_EXEC),
		Machine:   uint16(machine),
		Version:   uint32(elf.EV_CURRENT),
		Entry:     base + headers,
		Phoff:     64,
		Ehsize:    64,
		Phentsize: 56,
		Phnum:     2,
	}

	load := elf.Prog64{
		Type:   uint32(elf.PT_LOAD),
		Flags:  uint32(elf.PF_R | elf.PF_X),
		Vaddr:  base,
		Paddr:  base,
		Filesz: size,
		Memsz:  size,
		Align:  pageSize,
	}

	stack := elf.Prog64{Type: uint32(elf.PT_GNU_STACK), Flags: uint32(elf.PF_R | elf.PF_W), Align: 16}
	for _, part := range []any{head, load, stack, code} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			return nil, err
		}
	}

	return b.Bytes(), nil
}
