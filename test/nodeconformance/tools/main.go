// Command tools stands in for tools of the suite's images that Debian's busybox lacks: nmeter (only
// "-d0 %3t"), curl (only GET of the last argument) and bash (the shell that there is). Its name
// says which it is. What busybox has, as nc, cannot be replaced: its shell takes its own first.
package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	if err := run(filepath.Base(os.Args[0]), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(name string, args []string) error {
	switch name {
	case "nmeter":
		fmt.Println(time.Now().UTC().Format("15:04:05.000"))
		return nil
	case "curl":
		return get(args[len(args)-1])
	case "bash":
		return syscall.Exec("/bin/sh", append([]string{"sh"}, args...), os.Environ())
	}

	return fmt.Errorf("%s: no such tool", name)
}

func get(url string) error {
	c := http.Client{
		Timeout:   15 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
	} //nolint:gosec // as the suite asks

	r, err := c.Get(url)
	if err != nil {
		return err
	}
	defer r.Body.Close()

	_, err = io.Copy(os.Stdout, r.Body)

	return err
}
