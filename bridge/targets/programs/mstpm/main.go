// SPDX-License-Identifier: Apache-2.0

// Command mstpm is a TPM 2.0 for QEMU's "-tpmdev emulator": Microsoft's reference implementation in
// C, as github.com/google/go-tpm-tools/simulator compiles it, behind swtpm's control channel.
//
// QEMU sends each control command with one write and waits for the answer. The numbers and forms of
// the commands are those of tpm_ioctl.h, which QEMU and swtpm share; all numbers are big-endian.
//
// The program is the same wherever it is built:
//
//line /kcov-bridge/source/main.go:12
package main

import (
	"encoding/binary"
	"errors"
	"io"
	"log"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/google/go-tpm-tools/simulator"
)

// Control commands.
const (
	getCapability            = 1
	initialize               = 2
	shutdown                 = 3
	getEstablished           = 4
	setLocality              = 5
	cancel                   = 9
	resetEstablished         = 11
	stop                     = 14
	setDataDescriptor        = 16
	setBufferSize            = 17
	success                  = 0
	failure                  = 9 // TPM_FAIL
	headerSize               = 10
	bufferSize               = 4096 // MAX_COMMAND_SIZE of the implementation
	capabilities      uint64 = 1<<0 | 1<<1 | 1<<2 | 1<<3 | 1<<5 | 1<<7 | 1<<10 | 1<<12 | 1<<13
)

// What a TPM in failure mode answers: TPM_ST_NO_SESSIONS, the size, TPM_RC_FAILURE.
var failed = []byte{0x80, 0x01, 0, 0, 0, headerSize, 0, 0, 0x01, 0x01}

// A tpm is one TPM, which outlives the virtual machines that use it.
type tpm struct {
	lock      sync.Mutex // the implementation has one command at a time
	simulator *simulator.Simulator
}

// reset does what power off and on does.
func (t *tpm) reset() error {
	t.lock.Lock()
	defer t.lock.Unlock()
	if t.simulator != nil {
		if t.simulator.Reset() == nil {
			return nil
		}
		// It is in failure mode; a new one follows.
		_ = t.simulator.Close()
	}
	var err error
	t.simulator, err = simulator.Get()
	return err
}

// run returns the answer to a command.
func (t *tpm) run(command []byte) []byte {
	t.lock.Lock()
	defer t.lock.Unlock()
	if _, err := t.simulator.Write(command); err != nil {
		return failed
	}
	answer := make([]byte, bufferSize)
	n, err := t.simulator.Read(answer)
	if err != nil {
		return failed
	}
	return answer[:n]
}

// serveData answers the commands of the guest until QEMU closes the descriptor.
func (t *tpm) serveData(data *os.File) {
	defer data.Close()
	for {
		command := make([]byte, headerSize, bufferSize)
		if _, err := io.ReadFull(data, command); err != nil {
			return
		}
		size := binary.BigEndian.Uint32(command[2:])
		if size < headerSize || size > bufferSize {
			// The rest cannot be told from the next command.
			log.Printf("a command has %d bytes", size)
			return
		}
		command = command[:size]
		if _, err := io.ReadFull(data, command[headerSize:]); err != nil {
			return
		}
		if _, err := data.Write(t.run(command)); err != nil {
			return
		}
	}
}

// serveControl answers QEMU's control commands until it closes the connection.
func (t *tpm) serveControl(control *net.UnixConn) error {
	defer control.Close()
	message := make([]byte, bufferSize)
	ancillary := make([]byte, syscall.CmsgSpace(4))
	for {
		n, rest, _, _, err := control.ReadMsgUnix(message, ancillary)
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if n < 4 {
			return nil
		}
		answer := words(success)
		switch command := binary.BigEndian.Uint32(message); command {
		case getCapability:
			answer = binary.BigEndian.AppendUint64(nil, capabilities)
		case initialize:
			if err := t.reset(); err != nil {
				log.Print(err)
				answer = words(failure)
			}
		case getEstablished:
			answer = words(success, 0)
		case setBufferSize:
			answer = words(success, bufferSize, bufferSize, bufferSize)
		case setDataDescriptor:
			data, err := descriptor(ancillary[:rest])
			if err != nil {
				return err
			}
			go t.serveData(data)
		case shutdown, setLocality, cancel, resetEstablished, stop:
		default:
			log.Printf("control command %d is not known", command)
			answer = words(failure)
		}
		if _, err := control.Write(answer); err != nil {
			return err
		}
	}
}

func words(numbers ...uint32) []byte {
	var packed []byte
	for _, number := range numbers {
		packed = binary.BigEndian.AppendUint32(packed, number)
	}
	return packed
}

// descriptor returns the file that came with a message.
func descriptor(ancillary []byte) (*os.File, error) {
	messages, err := syscall.ParseSocketControlMessage(ancillary)
	if err != nil {
		return nil, err
	}
	for _, message := range messages {
		descriptors, err := syscall.ParseUnixRights(&message)
		if err == nil && len(descriptors) == 1 {
			return os.NewFile(uintptr(descriptors[0]), "data"), nil
		}
	}
	return nil, errors.New("the command to set a descriptor came without one")
}

func main() {
	if len(os.Args) != 2 {
		log.Fatalf("usage: %s SOCKET", os.Args[0])
	}
	t := &tpm{}
	if err := t.reset(); err != nil {
		log.Fatal(err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: os.Args[1], Net: "unix"})
	if err != nil {
		log.Fatal(err)
	}
	for {
		control, err := listener.AcceptUnix()
		if err != nil {
			log.Fatal(err)
		}
		if err := t.serveControl(control); err != nil {
			log.Print(err)
		}
	}
}
